"""Work divided over processes: every row once, results of all, and errors of one that end all."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
from together import in_processes

from scoresde import DataSpec, ScoreModel, config
from scoresde.storage import processes
from scoresde.storage.processes import Shares, first_tells, hosts, process, together, told
from scoresde.training import draw_samples, train
from sde_lib import VPSDE


class Own(Exception):
    """One that cannot be copied from its arguments."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def caught(call: Callable[[], Any]) -> tuple[str, str, bool] | Any:
    """The type and the words of an error, and whether all processes raise it; or what is returned."""
    try:
        return call()
    except Exception as error:
        return type(error).__name__, str(error), told(error)


class Net(torch.nn.Module):
    """v = tanh(W x) t, which can be made to fail in one process."""

    def __init__(self, bad: int | None) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight, self.bad = torch.nn.Parameter(torch.randn(12, 12, generator=g)), bad

    def forward(self, x: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
        if process()[0] == self.bad:
            raise FloatingPointError("of this process only")
        return torch.tanh(x.flatten(1) @ self.weight).reshape(x.shape) * noise_level.reshape(-1, 1, 1)


def samples(n: int, batch_size: int, name: str, bad: int | None = None) -> Any:
    """Samples, as numbers, and calls."""
    words = [f"--config.sampling.batch_size={batch_size}", f"--config.sampling.solver.name={name}"]
    settings = config.override(config.defaults(), [*words, "--config.sampling.steps=4"])
    model = ScoreModel(Net(bad), VPSDE(), "v", "time", data_spec=DataSpec((3, 4)))
    drawn = caught(lambda: draw_samples(model, settings, n))
    return drawn if isinstance(drawn, tuple) else (drawn.data.numpy(), drawn.nfe.tolist())


def everything() -> dict[str, Any]:
    """What the functions do in a process of two."""
    rank, _ = process()

    def fails_in(bad: int, error: Exception) -> Callable[[], int]:
        def make() -> int:
            if rank == bad:
                raise error
            return rank

        return make

    found: dict[str, Any] = {"mine": [list(rows) for rows in Shares(7, 2).mine]}
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        whole = (torch.arange(7 * 3).reshape(7, 3) % 5).to(dtype)
        for n, size in ((7, 2), (7, 7), (1, 4)):
            shares = Shares(n, size)
            parts = [whole[rows.start : rows.stop].t().contiguous().t() for rows in shares.mine]
            first, every = shares.first(parts), shares.all(parts)
            assert torch.equal(every, whole[:n]) and every.dtype == dtype
            assert first is None if rank else torch.equal(first, whole[:n])
    found["worked"] = together(lambda: 10 + rank)
    found["failed"] = caught(lambda: together(fails_in(1, ValueError("no\nsuch"))))
    found["failed in all"] = caught(lambda: together(fails_in(rank, ValueError(f"{rank}"))))
    found["own"] = caught(lambda: together(fails_in(1, Own(1, 2))))
    found["told"] = first_tells(lambda: f"from {rank}")
    found["first failed"] = caught(lambda: first_tells(fails_in(0, FileNotFoundError("gone"))))
    assert hosts() is torch.distributed.group.WORLD
    ask = torch.distributed.get_backend_config
    torch.distributed.get_backend_config = lambda *_: "cuda:nccl"  # as if the devices had a backend of their own
    try:
        beside = hosts()
        assert beside is not torch.distributed.group.WORLD and hosts() is beside
        both = Shares(2, 1).all([torch.tensor([rank])])
        found["beside"] = together(lambda: rank), first_tells(lambda: rank + 5), both
    finally:
        torch.distributed.get_backend_config = ask
    return found


def test_two_processes():
    """Rows are gathered in their order, whatever their dtype; errors are raised by all, by the first one's words."""
    one, two = in_processes(2, everything)
    assert one["mine"] == [[0, 1], [4, 5]] and two["mine"] == [[2, 3], [6]]
    assert one["worked"] == 10 and two["worked"] == 11
    assert one["failed"] == two["failed"] == ("ValueError", "no\nsuch", True)
    assert one["failed in all"] == ("ValueError", "0", True) and two["failed in all"][0] == "ValueError"
    assert one["own"] == ("RuntimeError", "Own: 1 and 2", True) and two["own"] == ("Own", "1 and 2", True)
    assert one["told"] == two["told"] == "from 0"
    assert one["first failed"] == two["first failed"] == ("FileNotFoundError", "gone", True)
    for rank, found in enumerate((one, two)):
        assert found["beside"][:2] == (rank, 5) and found["beside"][2].tolist() == [0, 1]


def abandoned() -> Any:
    return caught(lambda: together(lambda: os._exit(9) if process()[0] else 1))


def test_a_process_that_dies_is_noticed():
    """At once, not after the time for which a busy one is waited for."""
    (kind, _, _), nothing = in_processes(2, abandoned, lost=1)
    assert kind == "RuntimeError" and nothing is None


@pytest.mark.parametrize("coupled", [False, True], ids=["rows", "coupled"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_row_is_in_one_share(monkeypatch, world, coupled):
    """Batches are those of one process, or smaller where that left a process without work."""
    for n in (1, 2, 7, 64, 100):
        for size in (1, 3, 64, 200):
            shares = []
            for rank in range(world):
                monkeypatch.setattr(processes, "process", lambda rank=rank: (rank, world))
                shares.append(Shares(n, size, coupled))
            rows = [i for share in shares for batch in share.mine for i in batch]
            assert sorted(rows) == list(range(n))
            longest = max(len(batch) for batch in shares[0].batches)
            assert longest <= size and (longest == min(size, n) or (not coupled and len(shares[0].batches) <= world))
            if not coupled and n >= world * (world - 1):  # ceil(n / w) w rows reach every one then
                assert all(share.mine for share in shares)


def test_of_one_process():
    """Without a group nothing is exchanged, and errors are what they were."""
    assert together(lambda: 3) == 3 and first_tells(lambda: 4) == 4
    assert caught(lambda: together(lambda: 1 // 0))[::2] == ("ZeroDivisionError", False)
    shares = Shares(5, 2)
    assert shares.first([torch.zeros(2), torch.ones(2), torch.ones(1)]).tolist() == [0, 0, 1, 1, 1]


def all_samples(cases: list[tuple[int, int, str]]) -> list[Any]:
    return [samples(*case) for case in cases]


def test_samples_of_two_processes():
    """Sample i belongs to seed i: bitwise those of one process where batches are the same, else to rounding.

    A batch of another size rounds its matrix products differently, a few units of 6e-8 over four steps of order one.
    """
    solvers, sizes = ("ddim", "euler_maruyama", "predictor_corrector"), ((7, 2), (7, 16), (1, 4))
    cases = [(n, size, name) for name in solvers for n, size in sizes]
    one, two = in_processes(2, all_samples, cases)
    for (n, size, name), (data, nfe), (none, no_calls) in zip(cases, one, two, strict=True):
        alone, calls = samples(n, size, name)
        assert nfe == calls and len(alone) == n and none.shape == (0, 3, 4) and no_calls == []
        if size < n or n == 1:
            assert (data == alone).all()
        torch.testing.assert_close(torch.from_numpy(data), torch.from_numpy(alone), rtol=1e-5, atol=1e-5)


def test_a_sampler_that_fails_in_one_process_ends_all():
    assert in_processes(2, samples, 7, 2, "ddim", 1) == [("FloatingPointError", "of this process only", True)] * 2


def training(workdir: str, bad: int | None) -> list[str]:
    """Trains for two steps, with a picture after each; what was said."""
    words = ["data.name=digits", "network.name=mlp", "network.mlp.width=8", "network.mlp.depth=1", "sampling.n=5"]
    words += ["sampling.batch_size=2", "sampling.steps=2", "training.steps=2", "training.sample_every=1"]
    words += ["training.batch_size=4", "training.cpu=True", "training.tensorboard=False", "training.eval_every=0"]
    settings = config.override(config.defaults(), [f"--config.{word}" for word in words])

    def sampler(model: ScoreModel, settings: Any) -> torch.Tensor:
        drawn = draw_samples(model, settings).data
        if process()[0] == bad:
            raise FloatingPointError("of this process only")
        assert len(drawn) == (0 if process()[0] else 5)
        return drawn

    said = io.StringIO()
    with redirect_stderr(said):
        train(settings, workdir, progress=False, sampler=sampler)
    return [line for line in said.getvalue().splitlines() if "picture" in line]


@pytest.mark.slow
def test_sample_pictures_are_drawn_by_all_and_written_once(tmp_path):
    """A sampler that fails in one process costs a line there; the run goes on."""
    assert in_processes(2, training, str(tmp_path / "good"), None) == [[], []]
    assert len(list((tmp_path / "good" / "samples").glob("*.png"))) == 2
    one, two = in_processes(2, training, str(tmp_path / "bad"), 1)
    assert one == [] and [line.split(": ")[1] for line in two] == ["of this process only"] * 2
