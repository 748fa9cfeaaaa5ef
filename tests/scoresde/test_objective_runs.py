"""Any objective under the one loop: against a loop written out, interrupted, split over parts and processes, saved."""

import os
import socket
import sys
import traceback

import pytest
import torch
from torch import nn
from toy_objectives import TOYS, Adversarial, points

from scoresde import config as configs
from scoresde.models import ScoreModel
from scoresde.objectives import OBJECTIVES
from scoresde.storage import latest, read_checkpoint
from scoresde.streams import Streams
from scoresde.training import read_metrics, train
from scoresde.training.batches import Order

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


def built(name):
    """An entry of the table with its defaults, on a model in float64."""
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
    return OBJECTIVES[name](model.double())


def everything(workdir):
    """All tensors of the newest checkpoint, and its state without the time of day."""
    found = read_checkpoint(latest(workdir / "checkpoints"))
    state = {name: value for name, value in found.state.items() if name not in ("seconds", "digest", "files")}
    metrics = [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(workdir / "metrics.jsonl")]
    return found.tensors, state, metrics


def run_both(tmp_path, make, at=5):
    """The run in one go, and interrupted in step `at`, after a checkpoint that is older."""

    def stop(step, values):
        if step >= at:
            raise Stop

    run(tmp_path / "whole", make())
    with pytest.raises(Stop):
        run(tmp_path / "parts", make(), stop)
    torch.rand(3)  # the state of the global generator does not matter
    run(tmp_path / "parts", make())
    return everything(tmp_path / "whole"), everything(tmp_path / "parts")


class Stop(Exception):
    pass


CASES = {**TOYS, **{name: (lambda name=name: built(name)) for name in OBJECTIVES}}


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
                os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                work()
                torch.distributed.barrier()
                code = 0
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * world


@pytest.mark.parametrize("name", sorted(CASES))
def test_accumulated_parts_change_nothing(tmp_path, name):
    run(tmp_path / "1", CASES[name](), steps=4)
    run(tmp_path / "4", CASES[name](), steps=4, accumulation=4)
    (tensors, _, metrics), (other, _, others) = (everything(tmp_path / n) for n in ("1", "4"))
    close(tensors, other)
    for record, again in zip(metrics, others, strict=True):
        assert record == pytest.approx(again, rel=1e-11)


def test_two_processes_change_nothing(tmp_path):
    run(tmp_path / "1", Adversarial(), steps=3)
    in_processes(2, lambda: run(tmp_path / "2", Adversarial(), steps=3))
    (tensors, _, metrics), (other, _, others) = (everything(tmp_path / n) for n in ("1", "2"))
    close(tensors, other)
    for record, again in zip(metrics, others, strict=True):
        assert record == pytest.approx(again, rel=1e-11)
