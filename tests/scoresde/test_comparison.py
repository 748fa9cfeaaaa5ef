"""`compare`: every column against something known, and what happens to bad input, failures and interruptions."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import sys
import time
import types

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils import benchmark

from scoresde import MLP, Comparison, DataSpec, ScoreModel, UNet, compare
from scoresde.comparison import bench, describe, parse_spec, runs, timing
from scoresde.comparison.specs import split_specs
from scoresde.data import classes
from scoresde.guidance import ClassifierFreeGuidance
from sde_lib import VPSDE, FlowSDE, GaussianMixture, Knot, Wrapper
from solvers import (
    DDIM,
    GRIDS,
    SOLVERS,
    Ancestral,
    Blended,
    BrownianPath,
    EulerMaruyama,
    Heun,
    Karras,
    Multistep,
    PerSample,
    PredictorCorrector,
    Recommended,
    recommend,
    solve,
)

QUICK = {"progress": False, "min_run_time": 0}  # no bars, and every run is timed once
MEAN, STD = 0.7, 0.5
SDE = VPSDE()
GAUSSIAN = GaussianMixture(torch.full((3,), MEAN, dtype=torch.float64)[None], std=STD)
MIXTURE = GaussianMixture([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.0]], std=[0.2, 0.3, 0.4])


def exact_flow(x: Tensor, t: Knot, s: Knot) -> Tensor:
    """Probability-flow map of Gaussian data: quantiles stay."""
    here, there = (math.sqrt((STD * k.alpha) ** 2 + k.sigma**2) for k in (t, s))
    return MEAN * s.alpha + there / here * (x - MEAN * t.alpha)


def quick(solvers, **options):
    options = {
        "shape": (3,),
        "n": 16,
        "repetitions": 2,
        "dtype": torch.float64,
        **QUICK,
        "nfe": (8,),
    } | options
    return compare(GAUSSIAN.reverse(SDE), solvers, **options)


def by_hand(solver, grid, nfe: int, repetition: int, n: int = 16, end: str = "stop") -> tuple[Tensor, Tensor]:
    """The run that a row stands for, from the public parts: same seeds, same start."""
    digest = hashlib.blake2b(f"compare 0 {repetition}".encode(), digest_size=7).digest()
    seeds = [int.from_bytes(digest, "little") + i for i in range(n)]
    like = torch.empty(n, 3, dtype=torch.float64)
    start = SDE.prior_std * PerSample(seeds).bind(like).normal("prior")
    noise = BrownianPath(seeds)
    return start, solve(GAUSSIAN.reverse(SDE), start, solver, nfe=nfe, grid=grid, end=end, rng=noise).x


def test_path_error_against_the_exact_flow():
    """path_rms and path_median are those of the runs by hand; with `flow` and with the adaptive reference."""
    gaps = []
    for repetition in (0, 1):
        start, end = by_hand(Heun(), "blended", 8, repetition)
        exact = exact_flow(start, SDE.knot(1.0), SDE.knot(SDE.t_min))
        gaps.append((end - exact).square().mean(1).sqrt())
    rms = math.sqrt(float(torch.stack(gaps).square().mean()))
    median = sum(float(g.median()) for g in gaps) / 2
    for flow in (exact_flow, None):
        (row,) = quick("heun", end="stop", flow=flow).rows
        assert row["path_rms"] == pytest.approx(rms, rel=1e-6) and row["path_median"] == pytest.approx(median, rel=1e-6)
        assert row["nfe"] == 8 and row["steps"] == 4 and row["status"] == "ok"


def test_strong_error_shrinks_on_one_path():
    """A stochastic solver is measured against itself, finer, on the same Brownian path: order one, additive noise."""
    grid = "uniform_half_log_snr"
    got = quick(["ancestral"], nfe=(10, 20, 40), grid=grid, end="stop", n=32, repetitions=1, refine=16)
    (fit,) = got.orders()
    assert fit["against"] == "steps" and fit["points"] == 3 and 0.75 < fit["order"] < 1.35
    assert "same path" in got.rows[0]["reference"]
    row = quick(Ancestral(), grid=grid, end="stop", refine=4).rows[0]
    _, coarse = by_hand(Ancestral(), grid, 8, 0)
    _, fine = by_hand(Ancestral(), grid, 32, 0)
    first = float((coarse - fine).square().mean().sqrt())
    assert quick(Ancestral(), grid=grid, end="stop", refine=4, repetitions=1).rows[0]["path_rms"] == pytest.approx(
        first
    )
    assert row["repetitions"] == 2 and row["path_rms_se"] > 0


def test_fitted_orders_are_the_solvers():
    """DDIM 1, Heun 2 and the two-step method 2 on a Gaussian, where coarse runs are already in the asymptotic range."""
    names = {"ddim": 1, "heun": 2, "dpmpp_2m": 2}
    got = quick(list(names), nfe=(40, 80, 160), grid="uniform_half_log_snr", end="stop", flow=exact_flow, repetitions=1)
    for fit in got.orders():
        assert abs(fit["order"] - names[fit["label"]]) < 0.35 and fit["declared"] == names[fit["label"]]


class Counted(Wrapper):
    """Counts calls, and may sleep in each or break off."""

    def __init__(self, inner, sleep: float = 0.0, stop_after: float = math.inf) -> None:
        super().__init__(inner)
        self.calls, self.sleep, self.stop_after = 0, sleep, stop_after

    def __call__(self, x, t):
        self.calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        time.sleep(self.sleep)
        return self.inner(x, t)


class Clock:
    """A clock that stands still unless told."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        for module in (timing, runs):
            monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_time_goes_where_it_is_spent(monkeypatch):
    """Time in the network, in the steps and in the noise: in the network's seconds, beyond them, and in neither."""
    clock = Clock(monkeypatch)

    class Slow(Wrapper):
        def __call__(self, x, t):
            clock.pass_by(0.02)
            return self.inner(x, t)

    class SlowSteps(DDIM):
        def step(self, *args):
            clock.pass_by(0.01)
            return super().step(*args)

    class SlowDraw(PerSample):
        def bind(self, x):
            draw = super().bind(x)
            normal = draw.normal
            draw.normal = lambda *key: (clock.pass_by(0.02), normal(*key))[1]
            return draw

    def times(rev, solver):
        (row,) = compare(rev, solver, **options).rows
        return row, [row[f"{name}seconds"] for name in ("", "network_", "overhead_", "noise_")]

    options = {"shape": (3,), "n": 8, "repetitions": 1, **QUICK, "path_error": False, "nfe": (20,)}
    rev = GAUSSIAN.reverse(SDE)
    row, seconds = times(Slow(rev), "heun")
    assert seconds == pytest.approx([0.02 * row["nfe"], 0.02 * row["nfe"], 0.0, 0.0])
    row, seconds = times(rev, SlowSteps())
    assert seconds == pytest.approx([0.01 * row["steps"], 0.0, 0.01 * row["steps"], 0.0]) and row["steps"] == 19
    monkeypatch.setattr(bench, "PerSample", SlowDraw)
    row, seconds = times(rev, "ancestral")  # ordinary noise takes no time on this clock
    assert seconds == pytest.approx([0.0, 0.0, 0.0, 0.02 * row["steps"]])


def test_what_happens_once_is_no_part_of_the_time(monkeypatch):
    """A solver that imports a library or tabulates coefficients at its first run."""
    clock, bound = Clock(monkeypatch), []

    class Lazy(DDIM):
        def bind(self, knots):
            if not bound:
                clock.pass_by(0.5)
            bound.append(knots)
            return super().bind(knots)

    (row,) = quick(Lazy(), repetitions=1, path_error=False).rows
    assert row["seconds"] == 0.0 and len(bound) == 2


def test_short_runs_are_repeated_and_their_median_counts(monkeypatch):
    """By torch's own timer, on as many threads as the runs have; a run that was held up does not count."""

    class HeldUp(benchmark.Timer):
        def __init__(self, stmt, globals, num_threads):
            assert num_threads == torch.get_num_threads()
            super().__init__(stmt, globals=globals, num_threads=num_threads)

        def blocked_autorange(self, min_run_time):
            task = self._task_spec
            return benchmark.Measurement(number_per_run=2, raw_times=[2.0, 2.2, 2.4, 2.6, 90.0], task_spec=task)

    with monkeypatch.context() as patch:
        patch.setattr(timing, "Timer", HeldUp)
        assert timing.median_seconds(lambda: None, 0.2) == pytest.approx(1.2)
    calls = Counted(GAUSSIAN.reverse(SDE))
    options = {"shape": (3,), "n": 4, "nfe": (3,), "repetitions": 1, "path_error": False, "progress": False}
    (row,) = compare(calls, "ddim", min_run_time=0.02, **options).rows
    assert calls.calls > 1 + 2 * 3 + 3 * 3  # the probe, a warm run, the measured one, and repetitions of it
    assert row["seconds"] == pytest.approx(row["network_seconds"] + row["overhead_seconds"])
    assert row["network_seconds"] > 0 and row["nfe"] == 3


def test_a_row_has_the_median_of_its_repetitions():
    run = {"label": "a", "budget": "nfe=5", "status": "ok", "nfe": 5.0, "kind": "deterministic", "machine": "one"}
    runs = [{**run, "seconds": s, "network_seconds": s / 2} for s in (1.0, 9.0, 1.2)]
    (row,) = Comparison({"n": 8}, {}, {}, runs).rows
    assert (row["seconds"], row["network_seconds"], row["overhead_seconds"]) == (1.2, 0.6, 0.6)


def test_the_bar_of_a_reference_moves(capsys):
    """Along the angle for the adaptive ODE; a bar for a finer run, too."""
    slow = Counted(GAUSSIAN.reverse(SDE), sleep=0.005)
    compare(
        slow, "ddim,ancestral", shape=(3,), n=2, nfe=(4,), repetitions=1, refine=2, min_run_time=0, progress=True
    )  # fmt: skip
    shown = capsys.readouterr().err
    assert "comparing" in shown and "reference: solver's own run of 6 steps" in shown
    shares = [int(share) for share in re.findall(r"adaptive ODE[^:]*: +(\d+)%", shown)]
    assert shares[0] == 0 and max(shares) > 10 and shares == sorted(shares)


def test_interrupted_and_resumed(tmp_path):
    """Killed half-way, the second call does only what is missing, and the result is the uninterrupted one."""
    options = {"shape": (2,), "n": 8, "repetitions": 2, **QUICK, "nfe": (4, 8), "dtype": torch.float64}
    rev, solvers = MIXTURE.reverse(SDE), "ddim,heun,euler_maruyama"
    whole = Counted(rev)
    want = compare(whole, solvers, path=tmp_path / "whole.jsonl", **options)
    with pytest.raises(KeyboardInterrupt):
        compare(Counted(rev, stop_after=whole.calls // 2), solvers, path=tmp_path / "cut", **options)
    file = tmp_path / "cut" / "compare.jsonl"
    done = len(file.read_text().splitlines()) - 1
    assert 0 < done < 12
    with file.open("a") as half_written:
        half_written.write('{"key": "half a li')
    rest = Counted(rev)
    got = compare(rest, solvers, path=tmp_path / "cut", **options)
    assert rest.calls < whole.calls
    for a, b in zip(got.rows, want.rows, strict=True):
        for name in ("label", "budget", "nfe", "path_rms", "path_median"):
            assert a[name] == pytest.approx(b[name])
    again = Counted(rev)
    compare(again, solvers, path=tmp_path / "cut", **options)
    assert again.calls == 1  # the probe only
    more = Counted(rev)
    compare(more, f"{solvers},midpoint", path=tmp_path / "cut", **options)
    # the probe, then per budget an untimed run of one sample and two repetitions: no reference is solved again
    assert more.calls == 1 + 3 * (3 + 7)
    for file in (tmp_path / "cut" / "compare_references").iterdir():  # a damaged one is
        file.write_bytes(file.read_bytes()[:-1])
    damaged = compare(rev, f"{solvers},midpoint,ralston", path=tmp_path / "cut", **options)
    assert damaged.rows[-1]["path_rms"] > 0
    with pytest.raises(ValueError, match="n \\(8 then, 9 now\\)"):
        compare(rev, solvers, path=tmp_path / "cut", **{**options, "n": 9})
    with pytest.raises(ValueError, match="another score"):
        other = GaussianMixture([[0.0, 0.0]], std=1.0).reverse(SDE)
        compare(other, solvers, path=tmp_path / "cut", **options)
    compare(rev, "euler_maruyama", path=tmp_path / "cut", resume=False, **{**options, "n": 9})
    assert len(list((tmp_path / "cut" / "compare_references").iterdir())) == 2  # its own, one per repetition


def test_a_file_is_resumed_by_the_same_comparison_only(tmp_path):
    """Another feature extractor of the same name, another `decode`, and files that are something else."""

    def features(of):
        return lambda x: x[:, of : of + 1]

    options = {"samples": GAUSSIAN.sample(50, torch.Generator().manual_seed(0)), "repetitions": 1, "path": tmp_path}
    want = quick("ddim", features=features(0), **options)
    assert quick("ddim", features=features(0), **options).rows == want.rows
    for other in ({"features": features(1)}, {"features": features(0), "decode": lambda x: 2 * x}):
        with pytest.raises(ValueError, match="another metric"):
            quick("ddim", **options | other)
    for text in ("a note of mine\n", '{"step": 3}\n', "[1]\n"):
        (tmp_path / "mine.jsonl").write_text(text)
        with pytest.raises(ValueError, match="not a comparison"):
            quick("ddim", **options | {"path": tmp_path / "mine.jsonl"})
        assert (tmp_path / "mine.jsonl").read_text() == text
    lines = (tmp_path / "compare.jsonl").read_text().splitlines()
    elsewhere = json.loads(lines[1]) | {"machine": "another"}
    (tmp_path / "compare.jsonl").write_text(f"{lines[0]}\n{json.dumps(elsewhere)}\n")
    mixed = quick("ddim,heun", features=features(0), **options)
    assert "several machines" in mixed.table() and "several machines" not in want.table()


def test_rows_for_what_does_not_work():
    """A budget that is too small, a defect and a failing run cost their rows only."""

    class Defect(DDIM):
        def step(self, *args):
            raise RuntimeError("oh no")

    got = quick([("defect", Defect(), None), "heun", "unipc"], nfe=(1, 8), repetitions=1, end="stop")
    status = {(row["label"], row["budget"]): row["status"] for row in got.rows}
    assert status == {
        ("defect", "nfe=1"): "failed",
        ("defect", "nfe=8"): "failed",
        ("heun", "nfe=1"): "skipped",
        ("heun", "nfe=8"): "ok",
        ("unipc", "nfe=1"): "skipped",
        ("unipc", "nfe=8"): "ok",
    }
    assert "oh no" in got.rows[0]["reason"] and "at least 2" in got.table()
    nan = SDE.reverse(score=lambda x, t: torch.where(t.reshape(-1, 1) < 0.3, math.nan, -x))
    (row,) = compare(nan, "ddim", shape=(2,), n=4, nfe=(6,), repetitions=1, **QUICK).rows
    assert row["status"] == "failed" and "not finite" in row["reason"] and row["path_rms"] is None


def test_a_reference_that_fails_costs_the_distance_only():
    """The run, its time and its samples stay."""
    for flow, says in ((lambda x, t, s: x[:1], "`flow` must return"), (lambda x, t, s: 1 / 0, "division by zero")):
        (row,) = quick("ddim", flow=flow, repetitions=1).rows
        assert row["status"] == "ok" and row["nfe"] == 8 and row["path_rms"] is None and says in row["reference"]


@pytest.mark.parametrize("end", ["stop", "denoise"])
def test_metrics_see_the_samples_in_data_units(end):
    """A metric of one's own, against the run by hand; parts of the batch change nothing, nor does the path's error."""
    target = torch.zeros(5, 3, dtype=torch.float64)
    options = {
        "metrics": {"top": lambda x, y: float((x - y[:1]).max())}, "samples": target, "decode": lambda x: 3 * x + 1,
        "grid": "uniform_half_log_snr", "end": end, "repetitions": 1,
    }  # fmt: skip
    rows = quick("ancestral,heun", **options).rows
    for row, solver in zip(rows, (Ancestral(), Heun()), strict=True):
        _, x = by_hand(solver, "uniform_half_log_snr", 8, 0, end=end)
        assert row["top"] == pytest.approx(3 * float(x.max()) + 1, rel=1e-9)
    for row, part in zip(rows, quick("ancestral,heun", batch_size=5, **options).rows, strict=True):
        for name in ("top", "path_rms", "path_median", "nfe"):
            assert part[name] == pytest.approx(row[name], rel=1e-6)


def test_conditions_go_with_their_samples(tmp_path):
    """Sample i has row i in every part of the batch, at every depth, in runs and in their references; guidance costs
    two evaluations a call. What was run under other conditions is another comparison."""

    def score(x, t, place=None):
        return -x if place is None else SDE.alpha(t)[:, None] * place["deep"]["m"][:, None] * place["by"] - x

    labels = torch.arange(6.0, dtype=torch.float64)
    condition = {"place": {"deep": {"m": labels}, "by": 2.0}}
    seen = []

    def keep(x, y):
        seen.append(x.clone())
        return 0.0

    def run(problem, batch_size=None, solvers="ddim,adaptive", **more):
        options = {"shape": (2,), "n": 6, "nfe": (9,), "rtol": (1e-3,), "repetitions": 1, "dtype": torch.float64}
        options |= {"tolerance": 1e-5, "samples": torch.zeros(2, 2), "metrics": {"keep": keep}, **QUICK, **more}
        rows = compare(problem, solvers, batch_size=batch_size, **options).rows
        return seen[-1], [row[name] for row in rows for name in ("nfe", "path_rms")]

    rev = SDE.reverse(score=score)
    whole, figures = run(rev, condition=condition, guidance=1.5)
    parts, same = run(rev, batch_size=4, condition=condition, guidance=1.5)
    _, also = run(ClassifierFreeGuidance(rev.given(**condition), 1.5), solvers="ddim")
    torch.testing.assert_close(whole, parts)
    assert figures[:3] == pytest.approx(same[:3], rel=1e-6) and figures[:2] == pytest.approx(also, rel=1e-12)
    assert figures[0] == 8 and 0 < figures[1] < 1
    # unit variances: guidance moves the mean of row i from 2 i to 1.5 x 2 i (1 - alpha(T)), and nothing else
    free, _ = run(rev, condition={"place": None})
    shift = 3.0 * labels[:, None] * (1.0 - SDE.alpha(1.0))
    torch.testing.assert_close(whole - free, shift.expand(6, 2), rtol=0, atol=1e-4)

    kept = {"path": tmp_path, "solvers": "ddim"}
    run(rev, condition=condition, **kept)
    for more in ({"condition": {"place": {"deep": {"m": labels + 1}, "by": 2.0}}}, {"guidance": 1.5}):
        with pytest.raises(ValueError, match="other settings"):
            run(rev, **kept, **{"condition": condition, **more})


def test_conditions_of_a_model_in_a_comparison():
    spec = DataSpec((2,), conditions=classes(3))
    model = ScoreModel(MLP((2,), conditions=spec.conditions), SDE, data_spec=spec)
    options = {"n": 4, "nfe": (4,), "repetitions": 1, **QUICK}
    found = compare(model, "ddim", condition={"class_label": torch.tensor([0, 1, 2, 0])}, guidance=2.0, **options)
    assert found.rows[0]["nfe"] == 4 and found.settings["guidance"] == 2.0
    for condition, error, message in (
        ({"class_label": torch.tensor([0, 1, 3])}, ValueError, r"shape \(4,\)"),
        ({"kind": torch.tensor([0, 1, 2, 0])}, ValueError, "no condition 'kind'"),
        (torch.tensor([0, 1, 2, 0]), TypeError, "a mapping"),
    ):
        with pytest.raises(error, match=message):
            compare(model, "ddim", condition=condition, **options)
    with pytest.raises(ValueError, match="each of the 4 samples, got 3"):
        compare(MIXTURE.reverse(SDE), "ddim", shape=(2,), condition={"m": torch.zeros(3)}, **options)
    with pytest.raises(ValueError, match="needs a condition"):
        compare(model, "ddim", guidance=2.0, **options)


def test_distances_between_samples():
    """More calls bring DDIM's samples to the noise floor; the floor is that of two samples of one law."""

    def draw(count: int, seed: int) -> Tensor:
        return MIXTURE.sample(count, torch.Generator().manual_seed(seed), torch.float64)

    got = compare(
        MIXTURE.reverse(SDE), "ddim", shape=(2,), n=400, nfe=(3, 40), repetitions=2, samples=draw, **QUICK
    )  # fmt: skip
    few, many = got.rows
    for name in ("sliced_wasserstein", "energy_distance", "mmd2"):
        floor = got.floors[name]
        assert few[name] > floor["mean"] + 4 * floor["std"] and few[name] > 3 * abs(many[name])
    assert "~" in got.table() and "(samples of one law)" in got.table()
    options = {"shape": (2,), "n": 400, "nfe": (40,), "samples": draw, **QUICK}
    features = compare(MIXTURE.reverse(SDE), "ddim", features=lambda x: x**2, **options)
    assert features.rows[0]["frechet_distance"] > 0


def test_what_is_noise_is_not_ranked():
    """A value within the floor's mean and two standard deviations is marked so, not as the smallest."""
    run = {"budget": "nfe=5", "status": "ok", "nfe": 5.0, "kind": "deterministic", "repetition": 0, "machine": "one"}
    runs = [{**run, "label": label, "gap": gap} for label, gap in (("a", 0.5), ("b", 0.9))]
    for mean, marks in ((0.45, ("0.5~", "0.9 ")), (0.3, ("0.5*", "0.9 ")), (0.85, ("0.5~", "0.9~"))):
        got = Comparison({"metrics": ["gap"], "n": 8}, {}, {"gap": {"mean": mean, "std": 0.05}}, runs)
        lines = [f"{line} " for line in got.table().splitlines()]
        assert all(mark in line for mark, line in zip(marks, lines[1:], strict=False))


def test_everybody_starts_alike_and_any_grid_or_end():
    """One label per budget; a grid of one's own; chains; a score model needs no shape."""
    labels = [row["label"] for row in quick("ddim, ddim@karras(rho=3), heun@blended", repetitions=1).rows]
    assert labels == ["ddim", "ddim@karras(rho=3)", "heun@blended"]
    chain = SDE.discretize(50)
    (row,) = compare(
        GAUSSIAN.reverse(chain), "ancestral", shape=(3,), n=8, nfe=(10,), repetitions=1, **QUICK
    ).rows  # fmt: skip
    assert row["status"] == "ok" and "50 levels" in row["reference"] and row["path_rms"] > 0
    one = compare(GAUSSIAN.reverse(FlowSDE()), "recommended,heun", shape=(3,), n=8, nfe=(6, 12), **QUICK).rows
    assert {row["status"] for row in one} == {"ok"}
    model = ScoreModel(UNet((1, 8, 8), channels=8), SDE, "v", data_spec=DataSpec((1, 8, 8), 17))
    (row,) = compare(model, "ddim", n=4, nfe=(4,), repetitions=1, **QUICK).rows
    assert row["status"] == "ok" and row["samples"] == 4


def test_the_default_grid_is_named():
    """Blended steps on an SDE, the levels of a chain; a grid of one's own; `Recommended` keeps what it recommends."""
    blended, other = (quick("ddim,recommended", repetitions=1, path_error=False, **o) for o in ({}, {"grid": "karras"}))
    assert [row["grid"] for row in blended.rows] == ["blended"] * 2 and "grid: blended" in blended.table()
    assert [row["grid"] for row in other.rows] == ["karras", "blended"]
    assert "grid: karras (ddim); blended (recommended)" in other.table()
    start, end = by_hand(DDIM(), Blended(), 8, 0, end="denoise")
    (row,) = quick(DDIM(), repetitions=1, samples=end, metrics={"gap": lambda x, y: float((x - y).abs().max())}).rows
    assert row["gap"] == 0.0 and len(start) == len(end)


@pytest.mark.parametrize("noise", [False, True])
def test_recommended_on_a_chain(noise):
    """As a text, with the chain's levels as its grid: the run of the recommended solver on them."""
    chain = SDE.discretize(40)
    rev = GAUSSIAN.reverse(chain)
    got = compare(
        rev, f"recommended(noise={noise})", shape=(3,), n=4, nfe=(6, 12), repetitions=1, dtype=torch.float64,
        samples=torch.zeros(2, 3), metrics={"first": lambda x, y: float(x[0, 0])}, path_error=False, **QUICK,
    )  # fmt: skip
    for row, nfe in zip(got.rows, (6, 12), strict=True):
        assert (row["status"], row["grid"], row["nfe"]) == ("ok", "chain(40)", nfe), row["reason"]
        word = hashlib.blake2b(b"compare 0 0", digest_size=7).digest()
        seeds = PerSample([int.from_bytes(word, "little") + i for i in range(4)])
        like = torch.empty(4, 3, dtype=torch.float64)
        start = chain.prior_std * seeds.bind(like).normal("prior")
        direct = solve(rev, start, recommend(nfe - noise, noise).solver, nfe=nfe, rng=seeds, end="denoise")
        assert row["first"] == pytest.approx(float(direct.x[0, 0]), rel=1e-12)


def test_recommended_is_what_recommend_says():
    """The row of a budget is the recommended method's on the recommended grid; direct use agrees."""
    got = quick("recommended", nfe=(6, 12, 30), end="stop", repetitions=1, flow=exact_flow)
    for row, nfe in zip(got.rows, (6, 12, 30), strict=True):
        best = recommend(nfe)
        start, end = by_hand(best.solver, best.grid, nfe, 0)
        exact = exact_flow(start, SDE.knot(1.0), SDE.knot(SDE.t_min))
        assert row["path_rms"] == pytest.approx(float((end - exact).square().mean().sqrt()), rel=1e-9)
    x = torch.randn(4, 3, dtype=torch.float64)
    for noise in (False, True):
        direct = solve(GAUSSIAN.reverse(SDE), x, Recommended(noise), steps=11, grid="blended", rng=1)
        best = recommend(12, noise)
        assert torch.equal(direct.x, solve(GAUSSIAN.reverse(SDE), x, best.solver, steps=11, grid="blended", rng=1).x)
        assert int(direct.nfe[0]) == Recommended(noise).nfe(11)


@pytest.fixture(scope="module")
def compared():
    return compare(
        MIXTURE.reverse(SDE), "ddim,heun,adaptive,ancestral", shape=(2,), n=40, nfe=(5, 10), rtol=(1e-1, 1e-2),
        samples=lambda n, seed: MIXTURE.sample(n, torch.Generator().manual_seed(seed), torch.float64), repetitions=2,
        metrics=["energy_distance"], refine=2, **QUICK,
    )  # fmt: skip


def test_files(compared, tmp_path):
    """CSV and JSON hold the rows unrounded; JSON reads back."""
    got = compared
    got.to_csv(tmp_path / "a.csv")
    got.to_json(tmp_path / "a.json")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["path_rms"]) for r in rows] == [r["path_rms"] for r in got.rows] and len(rows) == 8
    back = Comparison.from_json(tmp_path / "a.json")
    assert back.rows == got.rows and back.table() == got.table() and back.orders() == got.orders()
    json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    back.plot(tmp_path / "b.png")
    with pytest.raises(ValueError, match="No samples"):
        back.sheet(tmp_path / "x.png")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="not a comparison"):
        Comparison.from_json(tmp_path / "b.json")


def test_pictures(compared):
    """Figures, on Axes of one's own or not: labels with units, no title, every solver told from the others."""
    figure = compared.plot()
    left, right = figure.axes
    assert "network calls" in left.get_xlabel() and "model units" in left.get_ylabel()
    assert "seconds for 40 samples" in right.get_xlabel() and figure._repr_png_().startswith(b"\x89PNG")
    assert not figure.get_suptitle() and not any(axis.get_title() for axis in figure.axes)
    for axis in (left, right):
        for line in axis.lines:
            assert list(line.get_xdata()) == sorted(line.get_xdata())
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split(":")[0] for label in legend] == ["ddim", "heun", "adaptive", "ancestral", "filled", "hollow"]
    own = Figure()
    axes = own.subplots(1, 2)
    assert compared.plot(ax=axes, y="energy_distance") is own and "data units" in axes[0].get_ylabel()
    one = Figure().subplots()
    assert compared.plot(ax=one) is one.figure and one.get_xlabel() == left.get_xlabel()
    with pytest.raises(ValueError, match="got 3"):
        compared.plot(ax=list(Figure().subplots(1, 3)))
    with pytest.raises(ValueError, match="y"):
        compared.plot(y="fid")
    low, high = quick("ddim", repetitions=1).plot().axes[0].get_ylim()  # one point has room, too
    assert high > 1.5 * low
    names = [text.get_text() for axis in compared.sheet(budget="nfe=10").axes for text in axis.texts]
    assert names == ["ddim, 10 calls", "heun, 9 calls", "ancestral, 10 calls"]
    rows = Figure().subplots(1, 4)
    assert compared.sheet(ax=rows) is rows[0].figure


def test_in_a_notebook(compared, monkeypatch):
    """The table as HTML, text escaped; a data frame, or what to install for one."""
    page = compared._repr_html_()
    assert page.count("<tr>") == 10 and "<th>energy_distance</th>" in page and "grid: blended" in page
    run = {"label": "<b>", "budget": "nfe=5", "status": "failed", "reason": "1 < 2", "kind": "deterministic"}
    page = Comparison({"n": 8}, {}, {}, [{**run, "machine": "one"}])._repr_html_()
    assert "&lt;b&gt;" in page and "1 &lt; 2" in page and "<b>" not in page
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        compared.to_dataframe()
    frames = types.ModuleType("pandas")
    frames.DataFrame = lambda rows, columns: (rows, columns)
    monkeypatch.setitem(sys.modules, "pandas", frames)
    rows, columns = compared.to_dataframe()
    assert rows == compared.rows and set(columns) == set(rows[0])


@pytest.mark.parametrize("table", [SOLVERS, GRIDS])
def test_text_says_what_it_builds(table):
    """`describe` of anything reads back to it."""
    for cls in table.values():
        text = describe(cls())
        text = text if table is SOLVERS else f"ddim@{text}"
        entry = parse_spec(text)
        assert (entry.solver if table is SOLVERS else entry.grid) == cls()
    for solver in (Multistep(4, 5, "v", "angle"), PredictorCorrector("heun", "langevin"), EulerMaruyama(eta=0.5)):
        if type(solver) in SOLVERS.values():
            assert parse_spec(describe(solver)).solver == solver
    assert parse_spec("ddim(eta=0.5)@karras(rho=5)").grid == Karras(rho=5)
    assert parse_spec("recommended").grid is None and parse_spec("recommended@karras").grid == Karras()
    assert split_specs("a(b=1,c=(2,3)), d") == ["a(b=1,c=(2,3))", "d"]


@pytest.mark.parametrize(
    ("solvers", "options", "says"),
    [
        ("huen", {}, "Did you mean 'heun'"),
        ("heun(stpes=1)", {}, "no option 'stpes'"),
        ("ddim(eta=-1)", {}, "eta"),
        ("ddim(0.5)", {}, "need their names"),
        ("ddim(eta=__import__('os'))", {}, "literal"),
        ("ddim@karas", {}, "karras"),
        ("ddim,,heun", {}, "single commas"),
        ("ddim(eta=(1", {}, "close"),
        ("ddim,ddim", {}, "Two of the solvers"),
        ("", {}, "commas|empty|solver"),
        ([], {}, "empty"),
        ("ddim", {"nfe": (0,)}, "nfe"),
        ("ddim", {"nfe": (2.5,)}, "nfe"),
        ("ddim", {"rtol": (0.0,)}, "rtol"),
        ("ddim", {"n": 0}, "`n`"),
        ("ddim", {"repetitions": 0}, "repetitions"),
        ("ddim", {"end": "clean"}, "end"),
        ("ddim", {"shape": None}, "shape"),
        ("ddim", {"metrics": ["mmd2"]}, "give `samples`"),
        ("ddim", {"samples": torch.zeros(9, 4)}, "samples"),
        ("ddim", {"samples": torch.randn(50, 3), "metrics": ["fid"]}, "metric"),
        ("ddim", {"samples": torch.randn(50, 3), "metrics": {"seconds": max}}, "name of its own"),
        ("ddim", {"samples": torch.randn(50, 3), "metrics": ["mmd2"], "features": "identity"}, "frechet_distance"),
        ("ddim", {"samples": torch.randn(3, 3), "features": "identity"}, "at least 4 samples"),
        ("ddim", {"refine": 1}, "refine"),
        ("ddim", {"strong": DDIM()}, "strong"),
        ("ddim", {"tolerance": 2.0}, "tolerance"),
        ("ddim", {"dtype": torch.int64}, "dtype"),
    ],
)
def test_bad_input(solvers, options, says):
    """Refused before anything runs, in words that say what to do."""
    with pytest.raises((ValueError, TypeError), match=says):
        quick(solvers, **options)


def test_bad_types():
    """Not a problem, not a solver."""
    with pytest.raises(TypeError, match="ReverseSDE"):
        compare(lambda x: x, "ddim")
    with pytest.raises(TypeError, match="solver"):
        quick([DDIM])
