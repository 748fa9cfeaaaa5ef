"""The training loop: exact resumption, schedules, the budget of time, failures, and that it learns."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gaussian_scores import Answers

from scoresde import config as configs
from scoresde.config import ConfigError
from scoresde.objectives import DenoisingScoreMatching
from scoresde.storage import CheckpointError, latest, load_model, read_checkpoint
from scoresde.storage.locks import LockedError
from scoresde.training import TrainingError, draw_samples, read_metrics, train
from scoresde.training.batches import Order
from scoresde.training.optimizers import DECAYS, common_options
from scoresde.training.signals import ENDING, Signals
from sde_lib import SDES

TINY = [
    "--config.data.name=ring",
    "--config.data.ring.n=600",
    "--config.network.name=mlp",
    "--config.network.mlp.width=16",
    "--config.network.mlp.depth=1",
    "--config.training.batch_size=32",
    "--config.training.steps=12",
    "--config.training.warmup=4",
    "--config.training.log_every=5",
    "--config.training.eval_every=4",
    "--config.training.sample_every=0",
    "--config.training.checkpoint_every=4",
    "--config.training.tensorboard=False",
    "--config.training.cpu=True",
    "--config.sampling.n=8",
    "--config.sampling.steps=2",
]


def settings(*overrides):
    return configs.override(configs.defaults(), [*TINY, *overrides])


def run(workdir, *overrides, **options):
    return train(settings(*overrides), workdir, progress=False, **options)


class Stop(Exception):
    pass


def stop_at(step):
    def callback(now, values):
        if now >= step:
            raise Stop

    return callback


DIGITS = [
    "--config.data.name=digits",
    "--config.network.name=unet",
    "--config.network.unet.channels=8",
    "--config.network.unet.dropout=0.2",
    "--config.training.accumulation=2",
    "--config.training.condition_dropout=0.5",
]
VARIANTS = {
    "toy": [],
    "digits": DIGITS,
    "cosine": ["--config.training.decay=cosine", "--config.objective.denoising.times.name=importance"],
    "chain": ["--config.sde.chain=100", "--config.training.optimizer=adam"],
    "flipped": [*DIGITS, "--config.training.flip=True"],
    "channels_last": [*DIGITS, "--config.training.channels_last=True"],
    "lognormal": [f"--config.objective.denoising.{name}" for name in ("times.name=lognormal", "weighting.name=raw")],
    "bf16": ["--config.training.precision=bf16"],
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tmp_path, variant):
    """Stopped at step 10, so that steps 9 and 10 are done twice: weights, averages, moments, metrics, counters."""
    options = VARIANTS[variant]
    whole = run(tmp_path / "whole", *options)
    with pytest.raises(Stop):
        run(tmp_path / "parts", *options, callback=stop_at(10))
    assert latest(tmp_path / "parts" / "checkpoints").name == "step_00000008"
    torch.rand(3)  # the state of the global generator does not matter
    parts = run(tmp_path / "parts", *options)
    assert whole.step == parts.step == 12
    a, b = (read_checkpoint(latest(tmp_path / p / "checkpoints")) for p in ("whole", "parts"))
    assert set(a.tensors) == set(b.tensors) == {"part.model", "average.ema", "optimizer.train"}
    for file, tensors in a.tensors.items():
        assert len(tensors) > 5
        one, other = ((c.path / f"{file}.safetensors").read_bytes() for c in (a, b))
        assert one == other, file
    for state in (a.state, b.state):
        state.pop("seconds")
        state.pop("digest")
    assert a.state == b.state
    logs = [read_metrics(tmp_path / p / "metrics.jsonl") for p in ("whole", "parts")]
    for log in logs:
        for record in log:
            record.pop("seconds", None)
    assert logs[0] == logs[1] and [r["step"] for r in logs[0]] == [4, 5, 8, 10, 12]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, a.tensors["average.ema"][name]) and torch.equal(value, parts.model.state_dict()[name])


@pytest.fixture
def signals_as_in_a_shell():
    """A shell starts jobs in the background with SIGINT ignored, and the library leaves what is ignored alone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("signals_as_in_a_shell")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", None), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_after_the_step_and_ends(tmp_path, capsys, name, code):
    """And the rest of the run is as if it had never come."""
    number = getattr(signal, name)
    handlers = [signal.getsignal(n) for n in ENDING]

    def stop(step, values):
        os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt if code is None else SystemExit) as caught:
        run(tmp_path / "parts", "--config.training.checkpoint_every=0", callback=stop)
    assert code is None or caught.value.code == code
    assert f"{name}: saved after step 5" in capsys.readouterr().err
    assert latest(tmp_path / "parts" / "checkpoints").name == "step_00000005"  # the first logged one
    assert [signal.getsignal(n) for n in ENDING] == handlers
    run(tmp_path / "parts")
    run(tmp_path / "whole")
    one, other = (read_checkpoint(latest(tmp_path / p / "checkpoints")).tensors for p in ("parts", "whole"))
    for file, tensors in one.items():
        assert all(torch.equal(value, other[file][key]) for key, value in tensors.items())


@pytest.mark.usefixtures("signals_as_in_a_shell")
def test_a_signal_that_is_ignored_stays_so_and_a_second_one_acts_at_once():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.caught == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_run_in_the_workdir_is_refused(tmp_path):
    def second(step, values):
        with pytest.raises(LockedError, match=rf"in use by process {os.getpid()}"):
            run(tmp_path)
        seen.append(step)

    seen: list[int] = []
    assert run(tmp_path, callback=second).step == 12 and seen == [5, 10]
    assert not (tmp_path / ".lock").exists()


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path, capsys):
    def sampler(model, config):
        raise RuntimeError("no\nmemory")

    assert run(tmp_path, "--config.training.sample_every=6", sampler=sampler).step == 12
    assert "No picture of the samples after step 6: no memory\n" in capsys.readouterr().err


def test_damaged_files_of_a_run_are_one_sentence(tmp_path):
    run(tmp_path, "--config.training.keep=1")
    metrics, state = tmp_path / "metrics.jsonl", latest(tmp_path / "checkpoints") / "state.json"
    good = metrics.read_text()
    for text, message in (
        (good.replace('{"step": 5', '{"step": '), "Line 2 of .*metrics.jsonl is not valid JSON"),
        ("[1]\n" + good, "Line 1 of .* is not a record"),
        ('{"step": "x"}\n', "is not a record"),
        ("[" * 50_000 + "\n", "Line 1 of .*metrics.jsonl"),
    ):
        metrics.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            run(tmp_path)
        assert "\n" not in str(caught.value)
    metrics.write_text(good)
    state.write_text(state.read_text().replace('"ema": 12', '"ema": 92'))
    with pytest.raises(CheckpointError, match="not what was written"):
        run(tmp_path)


def test_seed_decides_everything(tmp_path):
    one, same, other = (run(tmp_path / n, f"--config.seed={s}") for n, s in (("a", 1), ("b", 1), ("c", 2)))
    weights = [torch.cat([p.flatten() for p in r.model.parameters()]) for r in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])


def test_the_callers_random_stream_is_untouched(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    run(tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_another_configuration_is_refused_and_a_longer_run_is_not(tmp_path):
    run(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"training\.learning_rate was 0\.001 and is 0\.01"):
        run(tmp_path, "--config.training.learning_rate=0.01")
    with pytest.raises(ConfigError, match=r"sde\.name was 'vp' and is 've'"):
        run(tmp_path, "--config.sde.name=ve")
    with pytest.raises(ConfigError, match=r"choose another --workdir"):
        run(tmp_path, resume=False)
    assert (tmp_path / "config.json").read_text() == before
    # options of an entry that is not used, and what does not touch the steps that were done
    done = run(tmp_path, "--config.sde.ve.sigma_max=9", "--config.training.steps=14", "--config.training.keep=1")
    assert done.step == 14 and run(tmp_path, "--config.training.steps=14").step == 14
    with pytest.raises(ConfigError, match=r"training\.steps"):  # under a decay the length shapes the learning rate
        run(tmp_path / "c", "--config.training.decay=linear")
        run(tmp_path / "c", "--config.training.decay=linear", "--config.training.steps=14")


def test_it_learns_the_ring(tmp_path):
    """The loss of the best possible model is known: that of the exact score on the same held-out data."""
    from scoresde.data import Ring

    options = ["steps=600", "batch_size=256", "log_every=100", "eval_every=0", "checkpoint_every=0", "decay=cosine"]
    overrides = [f"--config.training.{o}" for o in options]
    overrides += ["--config.network.mlp.width=64", "--config.network.mlp.depth=3", "--config.data.ring.n=5000"]
    overrides += ["--config.codec.affine.shift=0.0", "--config.codec.affine.scale=1.0"]  # states are data
    result = run(tmp_path, *overrides, "--config.training.learning_rate=3e-3")
    x_0 = result.data.held_out.data.repeat(8, 1)

    exact = Answers(result.model.law, Ring().mixture.reverse(result.model.law))
    objectives = [DenoisingScoreMatching(model) for model in (result.model, exact)]
    with torch.no_grad():
        losses = [float(o.loss(x_0, rng=torch.Generator().manual_seed(0))) for o in objectives]
    assert losses[1] < losses[0] < 1.1 * losses[1]  # the exact score is the minimiser; 10 % above it is well trained


def test_wall_time_budget_ends_the_run_and_its_decay(tmp_path):
    result = run(tmp_path, *(f"--config.training.{o}" for o in ("steps=100000", "max_seconds=0.5", "decay=linear")))
    assert 0 < result.step < 100000 and result.seconds >= 0.5
    rates = [r["learning_rate"] for r in read_metrics(tmp_path / "metrics.jsonl") if "learning_rate" in r]
    assert rates[-1] < 0.5e-3 and read_checkpoint(latest(tmp_path / "checkpoints")).step == result.step
    longer = run(tmp_path, *(f"--config.training.{o}" for o in ("steps=100000", "max_seconds=0.7", "decay=linear")))
    assert longer.step > result.step and longer.seconds >= 0.7  # time already spent counts


def test_divergence_is_an_error_that_keeps_the_last_checkpoint(tmp_path):
    overrides = [f"--config.training.{o}" for o in ("warmup=9", "learning_rate=1e30", "clip=0", "log_every=1")]
    with pytest.raises(TrainingError, match="Lower training"):
        run(tmp_path, *overrides, "--config.training.checkpoint_every=1")
    found = latest(tmp_path / "checkpoints")
    for value in read_checkpoint(found).tensors["average.ema"].values():
        assert bool(value.isfinite().all())


def test_files_of_a_run(tmp_path):
    """Sample pictures from a fixed seed, by the sampler that was given; TensorBoard; the configuration."""
    seen = []

    def sampler(model, config):
        seen.append((model.training, {k: v.clone() for k, v in model.state_dict().items()}))
        return draw_samples(model, config).data

    overrides = ["--config.training.sample_every=6", "--config.training.tensorboard=True"]
    result = run(tmp_path, *overrides, sampler=sampler)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]
    assert any((tmp_path / "tensorboard").iterdir())
    assert [training for training, _ in seen] == [False, False]
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, seen[-1][1][name])  # sampled with the averaged weights
    saved = configs.restore(tmp_path / "config.json")
    assert configs.differences(saved, settings(*overrides)) == []
    back = load_model(tmp_path)
    x, t = torch.zeros(2, 2), torch.full((2,), 0.5)
    assert torch.equal(back(x, t).noise, result.model(x, t).noise)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=0", "batch_size"),
        ("training.accumulation=3", "multiple of 3"),
        ("training.decay=cosin", "Did you mean 'cosine'"),
        ("training.precision=fp8", "training.precision"),
        ("training.optimizer=sgdd", "training.optimizer"),
        ("objective.name=denoisin", "Did you mean 'denoising'"),
        ("objective.denoising.weighting.name=unifrom", "Did you mean 'uniform'"),
        ("objective.denoising.times.name=late", r"Unknown objective\.times 'late'"),
        ("training.learning_rate=0", "learning_rate"),
        ("training.max_seconds=-1", "max_seconds"),
        ("training.condition_dropout=2", "condition_dropout"),
        ("sde.name=vpp", "Did you mean 'vp'"),
        ("network.name=unett", "Did you mean 'unet'"),
        ("network.name=unet", r"\(C, H, W\)"),
        ("model.parameterization=noize", "Did you mean 'noise'"),
        ("data.ring.modes=0", "modes"),
        ("sde.chain=5", "n > beta_max"),
        ("sampling.solver.name=huen", "Did you mean 'heun'"),
        ("sampling.grid.name=karas", "Did you mean 'karras'"),
        ("sampling.end=x", "end"),
        ("sampling.steps=0", "steps"),
        ("sampling.nfe=0", "nfe"),
        ("sampling.n=0", r"sampling\.n"),
        ("sampling.guidance=nan", "guidance"),
        ("sampling.guidance=2", "conditions"),
        ("sampling.grid.blended.mix=nan", "mix"),
        ("sampling.solver.heun.s_churn=nan", "s_churn"),
        ("training.eval_samples=0", "eval_samples"),
        ("training.learning_rate=nan", "learning_rate"),
        ("training.clip=nan", "clip"),
        ("training.max_seconds=inf", "max_seconds"),
        ("training.ema_decay=1", "decay"),
        ("training.beta2=1", "beta2"),
        ("training.eps=0", "eps"),
        ("model.sigma_data=0", "sigma_data"),
        ("model.sigma_data=nan", "sigma_data"),
        ("sde.vp.beta_max=nan", "beta_max"),
    ],
)
def test_bad_settings_fail_before_anything_is_written(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", f"--config.{override}")
    assert not (tmp_path / "run").exists()


TOGETHER = """
import os, signal, sys, torch; torch.set_num_threads(1)
from scoresde import config
from scoresde.training import train
workdir, steps, stop, *overrides = sys.argv[1:]
rank = os.environ["RANK"]
def callback(step, values):
    if rank == "1" and step == int(stop):
        os.kill(os.getpid(), signal.SIGTERM)
settings = config.override(config.defaults(), [*overrides, f"--config.training.steps={steps}"])
try:
    result = train(settings, workdir, progress=False, callback=callback)
except SystemExit as ended:
    print(ended.code, file=open(f"{workdir}/ended{rank}.txt", "w"))
    raise
total = sum(float(p.double().sum()) for p in result.model.state_dict().values())
print(total, file=open(f"{workdir}/rank{rank}.txt", "w"))
"""


@pytest.mark.slow
def test_two_processes_train_together_stop_together_and_resume(tmp_path, capsys):
    """Under torchrun; a signal to the second process saves and ends both, after the same step.

    Judged by what was written: gloo processes sometimes abort after their last line."""
    script = tmp_path / "main.py"
    script.write_text(TOGETHER)

    def launch(workdir, steps, stop=0):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        words = [*command, str(workdir), str(steps), str(stop), *TINY]
        subprocess.run(words, env=environment, capture_output=True, check=False)

    launch(tmp_path / "whole", 12)
    launch(tmp_path / "parts", 12, stop=5)
    assert latest(tmp_path / "parts" / "checkpoints").name == "step_00000005"
    assert {(tmp_path / "parts" / f"ended{rank}.txt").read_text() for rank in (0, 1)} == {"143\n"}
    launch(tmp_path / "parts", 12)
    a, b = (read_checkpoint(latest(tmp_path / p / "checkpoints")) for p in ("whole", "parts"))
    assert a.step == b.step == 12 and a.step == 12
    assert (a.path / "average.ema.safetensors").read_bytes() == (b.path / "average.ema.safetensors").read_bytes()
    ranks = [(tmp_path / "whole" / f"rank{i}.txt").read_text() for i in (0, 1)]
    assert ranks[0] == ranks[1]


# --- parts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "batch"), [(10, 3), (7, 7), (5, 12)])
def test_order_is_a_stream_of_permutations_and_a_function_of_the_step(n, batch):
    order = Order(n, batch, seed=1)
    steps = [order.rows(i) for i in range(4 * n)]
    stream = torch.cat(steps)
    for epoch in stream.split(n)[: len(stream) // n]:
        assert epoch.sort().values.tolist() == list(range(n))
    again = Order(n, batch, seed=1)
    for i in (3 * n, 0, 7):
        assert torch.equal(again.rows(i), steps[i])
    assert not torch.equal(Order(n, 4 * n, 2).rows(0), Order(n, 4 * n, 1).rows(0))


def test_learning_rate_warms_up_and_decays():
    section = settings("--config.training.learning_rate=2.0", "--config.training.warmup=4").training
    assert [common_options(section).rate(n, 0.0) for n in (1, 2, 4, 9)] == [0.5, 1.0, 2.0, 2.0]
    for decay, middle in (("constant", 2.0), ("linear", 1.0), ("cosine", 1.0)):
        section.decay = decay
        options = common_options(section)
        assert options.rate(9, 0.5) == pytest.approx(middle)
        assert DECAYS[decay](0.0) == 1.0 and options.rate(9, 2.0) == (2.0 if decay == "constant" else 0.0)


def test_metrics_survive_a_half_written_line(tmp_path):
    from scoresde.training import Metrics

    metrics = Metrics(tmp_path, tensorboard=False)
    metrics.scalars(1, loss=2.0)
    metrics.scalars(2, loss=float("nan"))
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
    again = Metrics(tmp_path, step=1, tensorboard=False)
    again.scalars(2, loss=3.0)
    again.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [2.0, 3.0]


LAWS = [*(f"sde.name={name}" for name in sorted(SDES) if name != "tabulated"), "sde.chain=50"]


@pytest.mark.parametrize("override", LAWS)
def test_the_default_sampler_works_on_every_law(override):
    config = settings(f"--config.{override}")
    model = configs.make_model(config, configs.make_data(config).spec)
    samples = draw_samples(model, config, 3)
    assert samples.data.shape == (3, 2) and bool(samples.data.isfinite().all())


def test_samples_do_not_depend_on_the_batch(tmp_path):
    model = run(tmp_path).model
    together = draw_samples(model, settings("--config.sampling.n=10"))
    apart = draw_samples(model, settings("--config.sampling.n=10", "--config.sampling.batch_size=3"))
    torch.testing.assert_close(together.data, apart.data, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together.data, draw_samples(model, settings("--config.sampling.seed=1"), 10).data)
    budget = draw_samples(model, settings("--config.sampling.nfe=7", "--config.sampling.solver.name=ddim"), 4)
    assert budget.nfe.tolist() == [7] * 4
    for overrides, message in (
        (["--config.sampling.guidance=2.0"], "needs a condition"),
        (["--config.sampling.solver.name=heunn"], "Did you mean 'heun'"),
        (["--config.sampling.grid.name=karass"], "Did you mean 'karras'"),
        (["--config.sampling.steps=0"], "steps"),
        (["--config.sampling.end=halt"], "end"),
    ):
        with pytest.raises(ConfigError, match=message):
            draw_samples(model, settings(*overrides))
    with pytest.raises(ConfigError, match="have none"):
        draw_samples(model, settings(), condition={"class_label": torch.zeros(64, dtype=torch.int64)})
