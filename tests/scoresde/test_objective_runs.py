"""Any objective under the one loop: against a loop written out, interrupted, split over parts and processes, saved."""

import os
import socket
import sys
import traceback

import pytest
import torch
from torch import nn
from toy_objectives import TOYS, Adversarial, Consistency, Distilled, network, points

from scoresde import config as configs
from scoresde.config import ConfigError
from scoresde.data import Dataset, Split
from scoresde.models import ScoreModel
from scoresde.objectives import OBJECTIVES, Average, Objective
from scoresde.storage import CheckpointError, latest, load_model, read_checkpoint
from scoresde.streams import Streams
from scoresde.training import read_metrics, train
from scoresde.training.batches import Order
from sde_lib import VESDE, VPSDE

SETTINGS = {
    "batch_size": 32,
    "steps": 6,
    "warmup": 3,
    "decay": "linear",
    "learning_rate": 1e-2,
    "log_every": 1,
    "eval_every": 3,
    "eval_samples": 20,
    "sample_every": 0,
    "checkpoint_every": 2,
    "tensorboard": False,
    "cpu": True,
}


def settings(**changes):
    config = configs.defaults()
    config.training.update({**SETTINGS, **changes})
    return config


def run(workdir, objective, callback=None, **changes):
    return train(settings(**changes), workdir, progress=False, callback=callback, objective=objective, data=points())


def built(name, **changes):
    """An entry of the table, on a model in float64."""
    torch.manual_seed(0)
    spec = points().spec.to_dict()
    options = {"shape": [2], "conditions": spec["conditions"], "width": 16, "depth": 1}
    model = ScoreModel.from_config(
        {
            "network": {"name": "mlp", "mlp": options},
            "sde": {"name": "vp"},
            "data_spec": spec,
            "codec": {"name": "affine", "affine": {"data_shape": [2], "shift": 0.5, "scale": 2.0}},
        }
    )
    return OBJECTIVES[name](model, **changes).double()


def everything(workdir):
    """All tensors of the newest checkpoint, and its state without the time of day."""
    found = read_checkpoint(latest(workdir / "checkpoints"))
    state = {name: value for name, value in found.state.items() if name not in ("seconds", "digest", "files")}
    metrics = [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(workdir / "metrics.jsonl")]
    return found.tensors, state, metrics


def begin(workdir, objective, at=5):
    """A run that dies in step `at`, after a checkpoint that is older."""

    def stop(step, values):
        if step >= at:
            raise Stop

    with pytest.raises(Stop):
        run(workdir, objective, stop)


def run_both(tmp_path, make):
    """The run in one go, and interrupted."""
    run(tmp_path / "whole", make())
    begin(tmp_path / "parts", make())
    torch.rand(3)  # the state of the global generator does not matter
    run(tmp_path / "parts", make())
    return everything(tmp_path / "whole"), everything(tmp_path / "parts")


class Stop(Exception):
    pass


CASES = {**TOYS, **{name: (lambda name=name: built(name)) for name in OBJECTIVES}}


class Larger(Consistency):
    """Its network has weights that nothing uses, as a condition's that is never given."""

    def __init__(self):
        super().__init__()
        self.model.register_parameter("idle", nn.Parameter(torch.ones(3, dtype=torch.float64)))


CASES["unused weights"] = Larger
CASES["uncertainty"] = lambda: built("edm", uncertainty=True)


@pytest.mark.parametrize("name", sorted(CASES))
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tmp_path, name):
    """Everything: parts, averages, optimizers, buffers of the objective's own, counters, metrics."""
    (tensors, *rest), (again, *other) = run_both(tmp_path, CASES[name])
    assert set(tensors) == set(again) and rest == other
    for file, values in tensors.items():
        assert all(torch.equal(value, again[file][key]) for key, value in values.items()), file
    objective = CASES[name]()
    wanted = {f"part.{part}" for part, _ in objective.named_children()}
    wanted |= {f"average.{average}" for average in objective.averages()}
    wanted |= {f"optimizer.{phase}" for phase in objective.phases}
    assert set(tensors) - wanted == ({"objective"} if [*objective.buffers(recurse=False)] else set())
    assert rest[0]["averages"] == {average: 6 for average in objective.averages()}


def test_two_phases_equal_a_loop_written_out(tmp_path):
    """Batches and noise keyed by phase and update, their own optimizers, clipping and rates; averages of the generator
    after its own updates."""
    run(tmp_path, Adversarial(), phases="generator:learning_rate=5e-3,clip=0.1")
    tensors, state, _ = everything(tmp_path)
    mine, data = Adversarial(), points()
    average, updates = [p.detach().clone() for p in mine.generator.parameters()], 0
    order, number = Order(len(data.train), 32, 0), 0
    optimizers = {
        "critic": torch.optim.AdamW(mine.critic.parameters(), betas=(0.9, 0.999), weight_decay=0.0),
        "generator": torch.optim.AdamW(mine.generator.parameters(), betas=(0.0, 0.999), weight_decay=0.0),
    }
    for step in range(6):
        for phase, times, rate, clip in (("critic", 2, 2e-2, 1.0), ("generator", 1, 5e-3, 0.1)):
            optimizers[phase].param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 3) * (1.0 - step / 6)
            for update in range(times):
                streams = Streams(0, range(32), 32, step, (phase, update))
                x, z = data.train.data[order.rows(number)], streams.normal("latent", (2,), torch.float64)
                number += 1
                made = mine.generator(z)
                if phase == "critic":
                    x.requires_grad_()
                    real = mine.critic(x)
                    slope = torch.autograd.grad(real.sum(), x, create_graph=True)[0]
                    fake = mine.critic(made.detach())
                    loss = nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()
                    loss = loss + 0.5 * slope.square().sum(1).mean()
                else:
                    loss = nn.functional.softplus(-mine.critic(made)).mean()
                weights = list(getattr(mine, phase).parameters())
                for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = slope
                torch.nn.utils.clip_grad_norm_(weights, clip)
                optimizers[phase].step()
        updates += 1
        kept = min(0.999, (1 + updates) / (10 + updates))
        weights = list(mine.generator.parameters())
        average = [kept * a + (1 - kept) * p.detach() for a, p in zip(average, weights, strict=True)]
    for part in ("generator", "critic"):
        for name, value in getattr(mine, part).state_dict().items():
            torch.testing.assert_close(tensors[f"part.{part}"][name], value, rtol=1e-11, atol=1e-12)
    for (name, _), value in zip(mine.generator.named_parameters(), average, strict=True):
        torch.testing.assert_close(tensors["average.ema"][name], value, rtol=1e-11, atol=1e-12)
    assert state["result"] == {"raw": "part.generator", "averaged": "average.ema"}
    assert float(tensors["optimizer.critic"]["critic.0.weight|step"]) == 12


# --- parts and processes ----------------------------------------------------------------------------------------------
def close(tensors, other, file=""):
    """Equal to the rounding of sums in another order."""
    assert set(tensors) == set(other)
    for name, value in tensors.items():
        if isinstance(value, dict):
            close(value, other[name], name)
        else:
            scale = float(value.abs().max()) if value.numel() else 0.0
            assert float((value - other[name]).abs().max()) <= 1e-12 * max(scale, 1e-3), (file, name)


def in_processes(world, work):
    """`work()` in so many forked processes, which form a gloo group under Accelerate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
                os.environ.update({name: str(value) for name, value in names.items()})
                work()
                torch.distributed.barrier()
                code = 0
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * world


def same_training(one, other):
    """Tensors to rounding, and every record: losses, held-out losses, norms, rates."""
    (tensors, _, metrics), (others, _, records) = everything(one), everything(other)
    close(tensors, others)
    for record, again in zip(metrics, records, strict=True):
        assert record == pytest.approx(again, rel=1e-11)


@pytest.mark.parametrize("name", sorted(CASES))
def test_accumulated_parts_change_nothing(tmp_path, name):
    run(tmp_path / "1", CASES[name](), steps=4)
    run(tmp_path / "4", CASES[name](), steps=4, accumulation=4)
    same_training(tmp_path / "1", tmp_path / "4")


def test_two_processes_change_nothing(tmp_path):
    run(tmp_path / "1", Adversarial(), steps=3)
    in_processes(2, lambda: run(tmp_path / "2", Adversarial(), steps=3))
    same_training(tmp_path / "1", tmp_path / "2")


def test_two_processes_have_one_model(tmp_path):
    """Built from other numbers in each, with batch statistics: all weights and buffers are those of the first one."""

    class Normalized(Consistency):
        def __init__(self):
            super().__init__()
            torch.manual_seed(int(os.environ["RANK"]))
            self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
            self.still = nn.Linear(2, 2)  # in no phase

    def work():
        objective = Normalized()
        run(tmp_path, objective, steps=2, eval_every=0)
        weights = objective.state_dict()
        assert not torch.equal(weights["model.1.running_mean"], torch.zeros(4, dtype=torch.float64))
        for name, value in weights.items():
            others = [torch.empty_like(value) for _ in range(2)]
            torch.distributed.all_gather(others, value)
            assert torch.equal(others[0], others[1]), name

    in_processes(2, work)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_and_parts_change_nothing(tmp_path, world):
    """Every objective, split over processes and parts; and begun by them, but finished by one process."""
    for name, make in CASES.items():
        run(tmp_path / name, make())

    def work():
        for name, make in CASES.items():
            for accumulation in (1, 4):
                run(tmp_path / f"{name} {accumulation}", make(), accumulation=accumulation)
            begin(tmp_path / f"{name} begun", make())

    in_processes(world, work)
    for name, make in CASES.items():
        assert latest(tmp_path / f"{name} begun" / "checkpoints").name == "step_00000004"
        run(tmp_path / f"{name} begun", make())
        for other in ("1", "4", "begun"):
            same_training(tmp_path / name, tmp_path / f"{name} {other}")


@pytest.mark.slow
def test_a_run_of_one_process_is_finished_by_two(tmp_path):
    for name, make in CASES.items():
        run(tmp_path / name, make())
        begin(tmp_path / f"{name} begun", make())

    def work():
        for name, make in CASES.items():
            run(tmp_path / f"{name} begun", make())

    in_processes(2, work)
    for name in CASES:
        same_training(tmp_path / name, tmp_path / f"{name} begun")


def digits(workdir, accumulation=1):
    """Five steps of a small U-Net in float32."""
    config = settings(steps=5, accumulation=accumulation, flip=True, condition_dropout="0.5", eval_every=5)
    config.network.name, config.network.unet.channels, config.network.unet.dropout = "unet", 8, 0.0
    train(config, workdir, progress=False)


@pytest.mark.slow
def test_losses_of_images_in_float32_agree(tmp_path):
    """Dequantized, mirrored, with classes left out: five steps to 1e-5."""
    digits(tmp_path / "whole")
    digits(tmp_path / "parts", 4)
    for world in (2, 4):
        in_processes(world, lambda world=world: digits(tmp_path / f"{world}", 2))
    records = [everything(tmp_path / place)[2] for place in ("whole", "parts", "2", "4")]
    assert [record["step"] for record in records[0]] == [1, 2, 3, 4, 5, 5]
    for others in records[1:]:
        for record, other in zip(records[0], others, strict=True):
            assert record == pytest.approx(other, rel=1e-5)


# --- what is refused, and what is saved -------------------------------------------------------------------------------
def test_another_teacher_is_refused_and_its_own_is_not(tmp_path):
    begin(tmp_path, Distilled())
    with pytest.raises(CheckpointError, match="trained with another 'teacher'"):
        run(tmp_path, Distilled(seed=4))
    assert run(tmp_path, Distilled()).step == 6


def test_a_teacher_in_a_file_is_known_by_its_bytes(tmp_path):
    class FromFile(Distilled):
        def frozen(self):
            return {"teacher": tmp_path / "teacher.safetensors"}

    (tmp_path / "teacher.safetensors").write_bytes(b"one")
    begin(tmp_path / "run", FromFile())
    (tmp_path / "teacher.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="trained with another 'teacher'"):
        run(tmp_path / "run", FromFile())
    (tmp_path / "teacher.safetensors").write_bytes(b"one")
    assert run(tmp_path / "run", FromFile()).step == 6


def test_another_objective_is_refused(tmp_path):
    begin(tmp_path, TOYS["consistency"]())
    with pytest.raises(CheckpointError, match="is of the objective toy_objectives:Consistency, not of toy_obj"):
        run(tmp_path, Distilled())


def test_a_run_that_its_length_shaped_is_not_made_longer(tmp_path):
    class Paced(Distilled):
        paced = True

    kinds = ((Paced, {}), (Distilled, {"phases": "train:decay=cosine"}), (Distilled, {}))
    for i, (kind, changes) in enumerate(kinds):
        run(tmp_path / f"{i}", kind(), decay="constant", steps=2, **changes)
        if i < 2:
            with pytest.raises(ConfigError, match=r"training\.steps was 2 and is 4"):
                run(tmp_path / f"{i}", kind(), decay="constant", steps=4, **changes)
    assert run(tmp_path / "2", Distilled(), decay="constant", steps=4).step == 4


def test_parts_in_no_phase_are_left_alone(tmp_path):
    class Guided(Distilled):
        def __init__(self):
            super().__init__()
            self.still = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).double()

        def forward(self, phase, batch, at):
            assert not self.still.training and not (self.training and self.still[0].weight.requires_grad)
            return super().forward(phase, batch, at) + self.still(batch.data).square().sum(1)

    objective = Guided()
    before = objective.still[0].weight.detach().clone()
    run(tmp_path, objective)
    assert torch.equal(objective.still[0].weight, before)
    assert torch.equal(everything(tmp_path)[0]["part.still"]["0.weight"], before)  # and saved


def test_other_options_of_a_phase_are_refused(tmp_path):
    """Two updates instead of one would take other samples from there on."""
    begin(tmp_path, Adversarial())
    other = Adversarial()
    other.optimizers = {**other.optimizers, "critic": {"updates": 1, "learning_rate": 2e-2}}
    with pytest.raises(CheckpointError, match="trained with updates=2 in the phase 'critic', and the objective has 1"):
        run(tmp_path, other)


def test_objectives_that_cannot_be_trained_are_refused(tmp_path):
    class Coupled(Distilled):
        group = 6

    class Loose(Distilled):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    class Shared(Distilled):
        def __init__(self):
            super().__init__()
            self.other = self.model[:1]

    class Lost(Distilled):
        phases = {"train": ("student",)}  # noqa: RUF012

    class Followed(Distilled):
        def averages(self):
            return {"ema": Average("teacher")}

    class Summed(Distilled):
        def forward(self, phase, batch, at):
            return super().forward(phase, batch, at).sum()

    class Nothing(Distilled):
        phases = {}  # noqa: RUF012

    class Word(Distilled):
        phases = {"train": "model"}  # noqa: RUF012

    class Still(Distilled):
        def __init__(self):
            super().__init__()
            self.model.requires_grad_(False)

    class Idle(Distilled):
        phases = {"train": ("model", "other")}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.other = network(2, 2)

    class Mean(Distilled):
        def forward(self, phase, batch, at):
            return super().forward(phase, batch, at).mean(0, keepdim=True)

    class Steep(Adversarial):
        held_out = Objective.held_out

    class Own(Distilled):
        def frozen(self):
            return {"teacher": self.model}

    class Gone(Distilled):
        def frozen(self):
            return {"teacher": [self.teacher]}

    class Alone(Distilled):
        group = 0

    class Masked(Distilled):
        def __init__(self):
            super().__init__()
            self.model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    class Complex(Distilled):
        def __init__(self):
            super().__init__()
            self.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))

    class Half(Distilled):
        optimizers = {"train": {"updates": 2.5}}  # noqa: RUF012

    for kind, message, changes in (
        (Nothing, "The objective has no phase", {}),
        (Word, r"needs a tuple of parts: \('model',\) instead of 'model'", {}),
        (Still, "The phase 'train' trains nothing", {}),
        (Idle, "The loss of the phase 'train' does not depend on the part 'other', which it trains", {}),
        (Mean, r"one loss per sample, floats of shape \(2,\), and the phase 'train' returns .* of shape \(1,\)", {}),
        (Steep, "`held_out` of the objective, by default .* fails without gradients: .* set training.eval_every=0", {}),
        (Own, "What is frozen as 'teacher' has weights of the part 'model': keep a copy of its own", {}),
        (Alone, "`group` of the objective must be an int >= 1, got 0", {}),
        (Masked, "'mask' of the part 'model' is NaN or infinite, .* persistent=False", {}),
        (Half, "Phase 'train': 2.5 is no whole number", {}),
        (Distilled, "Phase 'train': training.learning_rate must be finite", {"phases": "train:learning_rate=inf"}),
        (Coupled, "couples 6 consecutive samples, and a part has 32", {}),
        (Loose, "'scale' of the objective is in no part", {}),
        (Shared, "'model' and 'other' share a weight", {}),
        (Lost, "The phase 'train' trains 'student', which is no part", {}),
        (Followed, "The average 'ema' is of 'teacher', which is no part", {}),
        (Summed, r"one loss per sample, .* and the phase 'train' returns torch.float64 of shape \(\)", {}),
        (Distilled, "Unknown phase 'critic'", {"phases": "critic:updates=2"}),
        (Distilled, "option of the phase 'train' 'update'. Did you mean 'updates'", {"phases": "train:update=2"}),
        (Distilled, "Phase 'train': training.updates must be >= 1", {"phases": "train:updates=0"}),
        (Distilled, "Phase 'train': could not convert", {"phases": "train:clip=much"}),
        (Distilled, "write PHASE:OPTION=VALUE", {"phases": "train"}),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            run(tmp_path / "run", kind(), **changes)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="must be an Objective"):
        run(tmp_path / "run", object())
    with pytest.raises(TypeError, match="What is frozen as 'teacher' must be a module or a file, got list"):
        run(tmp_path / "run", Gone())
    with pytest.raises(TypeError, match=r"'wave' cannot be stored: .* got torch.complex64"):
        run(tmp_path / "run", Complex())
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_what_they_say_are_refused(tmp_path):
    """A label beyond the classes, and one missing, would have trained as none; NaN would have ended the run later."""

    class Picky(Distilled):
        def check(self, batch):
            raise ValueError("not these")

    good = points()
    z, label = good.train.data, good.train.condition["class_label"]
    for train_split, held_out, message in (
        (Split(z, {}), good.held_out, "'train' of the data 'points': The condition 'class_label' .* is missing"),
        (Split(z, {"class_label": label + 2}), good.held_out, "'train' .*: Condition `class_label` must be in 0 … 1"),
        (Split(z.log(), good.train.condition), good.held_out, "'train' .*: Data contain NaN"),
        (good.train, Split(z[:, :1], good.train.condition), r"'held_out' .*: Data must have shape \(B, 2\)"),
        (good.train, good.held_out.rows(slice(0)), "'held_out' .*: Data are empty"),
    ):
        data = Dataset("points", train_split, held_out, good.spec)
        with pytest.raises(ConfigError, match=message):
            train(settings(), tmp_path / "run", progress=False, objective=Distilled(), data=data)
    with pytest.raises(TypeError, match="`data` must be a Dataset, got Split"):
        train(settings(), tmp_path / "run", progress=False, objective=Distilled(), data=good.train)
    with pytest.raises(ConfigError, match="not these"):
        run(tmp_path / "run", Picky())
    assert not (tmp_path / "run").exists()
    data = Dataset("points", good.train, good.held_out.rows(slice(0)), good.spec)  # which nothing looks at
    config = settings(steps=1, eval_every=0)
    assert train(config, tmp_path / "run", progress=False, objective=Distilled(), data=data).step == 1


def test_buffers_are_moved_by_training_alone(tmp_path):
    """Neither the trial before the first step nor held-out losses leave a trace, in buffers that are assigned anew or
    changed in place: how often is evaluated may change within a run."""

    class Counting(Distilled):
        def __init__(self):
            super().__init__()
            self.register_buffer("anew", torch.zeros(()))
            self.model.register_buffer("seen", torch.zeros(()))

        def forward(self, phase, batch, at):
            self.anew, self.model.seen = self.anew + 1, self.model.seen.add_(1)
            return super().forward(phase, batch, at)

    counting = Counting()
    run(tmp_path, counting, eval_every=2, accumulation=2)
    assert float(counting.anew) == float(counting.model.seen) == 12


def test_rows_of_a_group_stay_together(tmp_path):
    """A loss that couples 8 rows: in parts of 8 it is what it is in one part of 32."""

    class Coupled(Distilled):
        group = 8

        def forward(self, phase, batch, at):
            losses = super().forward(phase, batch, at)
            return losses * losses.reshape(-1, 8).mean(1, keepdim=True).expand(-1, 8).reshape(-1)

    with pytest.raises(ValueError, match="couples 8 consecutive samples: 12 is no multiple"):
        Coupled().loss(points().train.data[:12])
    run(tmp_path / "1", Coupled(), steps=2)
    run(tmp_path / "4", Coupled(), steps=2, accumulation=4)
    same_training(tmp_path / "1", tmp_path / "4")


def test_an_own_model_is_trained_in_place_saved_and_read_again(tmp_path):
    """One that says how it is built comes back; of one that was put together in code, the weights are kept."""
    rebuilt, plain = built("denoising").model, ScoreModel(Field(), VPSDE(), data_spec=points().spec)
    for place, model in (("rebuilt", rebuilt), ("plain", plain)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        result = train(settings(), tmp_path / place, progress=False, model=model, data=points())
        assert result.model is model and not all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    back = load_model(tmp_path / "rebuilt")
    assert all(torch.equal(value, rebuilt.state_dict()[name]) for name, value in back.state_dict().items())
    with pytest.raises(CheckpointError, match="holds tensors but no scoresde model configuration"):
        load_model(tmp_path / "plain")
    kept = everything(tmp_path / "plain")[0]["average.ema"]
    given = ScoreModel(Field(), VPSDE(), data_spec=points().spec)
    assert load_model(tmp_path / "plain", model=given) is given and not given.training
    for name, value in given.state_dict().items():
        assert torch.equal(value, kept[name]) and torch.equal(value, plain.state_dict()[name])
    with pytest.raises(CheckpointError, match="do not fit the model; missing"):
        load_model(tmp_path / "plain", model=rebuilt)
    again = ScoreModel(Field(), VPSDE(), data_spec=points().spec)
    train(settings(), tmp_path / "plain", progress=False, model=again, data=points())  # which was done
    assert all(torch.equal(value, kept[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("law", [VPSDE(beta_max=15.0), VESDE(sigma_max=20.0).discretize(30)], ids=["sde", "chain"])
def test_an_own_network_that_says_how_it_is_built_is_saved_with_its_class_and_built_again(tmp_path, law):
    model = ScoreModel(Said(width=5), law, "noise", "log_sigma", points().spec, sigma_data=2.0)
    train(settings(), tmp_path, progress=False, model=model, data=points())
    back = load_model(tmp_path)
    assert type(back.network) is Said and back.network.width == 5 and back.config() == model.config()
    assert back.config()["network"] == {"name": f"{__name__}:Said", "Said": {"width": 5}}
    x = torch.randn(4, 2, dtype=torch.float64)
    t = torch.tensor([0, 3, 7, 29]) if law.index_levels else torch.full((4,), 0.3, dtype=torch.float64)
    assert torch.equal(back(x, t).score, model(x, t).score)


class Field(nn.Module):
    """A network of one's own."""

    def __init__(self, width=2):
        super().__init__()
        self.width, self.layers = width, network(3, 2)

    def forward(self, x, noise_level, **condition):
        return self.layers(torch.cat([x, noise_level[:, None]], 1))


class Said(Field):
    """And it says how it is built."""

    def config(self):
        return {"width": self.width}


def test_an_update_that_overflows_is_skipped_and_moves_no_average(tmp_path, monkeypatch):
    """fp16's scaler, on the CPU. In step 3 the generator's gradient overflows: the critic's updates are not touched,
    and the run is interrupted and resumed with the scale that this left."""
    from scoresde.training import assembly

    class Overflowing(Adversarial):
        def forward(self, phase, batch, at):
            losses = super().forward(phase, batch, at)
            if (phase, at.step) != ("generator", 2):
                return losses
            weight = self.generator.weight.sum()
            return losses + (weight - weight.detach()) * 1e306  # nothing, with an endless slope

    real = assembly._accelerator

    def scaled(section):
        accelerator = real(section)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return accelerator

    monkeypatch.setattr(assembly, "_accelerator", scaled)
    (tensors, state, metrics), others = run_both(tmp_path, Overflowing)
    assert state["averages"] == {"ema": 5} and state["scaler"]["scale"] == 2.0**9
    steps = {phase: tensors[f"optimizer.{phase}"] for phase in ("critic", "generator")}
    assert float(steps["critic"]["critic.0.weight|step"]) == 12
    assert float(steps["generator"]["generator.bias|step"]) == 5
    assert [r["gradient_norm.generator"] for r in metrics if "loss.critic" in r].index(None) == 2
    assert (state, metrics) == others[1:]
    for file, values in tensors.items():
        assert all(torch.equal(value, others[0][file][name]) for name, value in values.items())
    run(tmp_path / "plain", Adversarial(), steps=2)  # a scale that is a power of two changes nothing else
    early = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert early[0]["gradient_norm.critic"] == metrics[0]["gradient_norm.critic"]
