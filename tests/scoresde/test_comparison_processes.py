"""A comparison by two processes: the figures of one, every sample in one process, one file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from together import in_processes

from scoresde.comparison import compare
from scoresde.storage.processes import process
from sde_lib import VPSDE, GaussianMixture
from solvers import DDIM, Solver

MIXTURE = GaussianMixture([[-1.0, 0.3], [0.8, -0.5]], std=0.2)
TIMES = ("seconds", "seconds_se", "network_seconds", "overhead_seconds", "noise_seconds")
SOLVERS = "heun, euler_maruyama, ancestral, predictor_corrector(corrector=langevin(norm='batch')), adaptive, rk4"


class Bad(DDIM):
    """Fails in the second process."""

    def step(self, *args: Any) -> Any:
        if process()[0] == 1:
            raise FloatingPointError("of this process only")
        return super().step(*args)


def compared(path: str | None, batch_size: int, solvers: str | Solver, **options: Any) -> list[dict[str, Any]]:
    """Rows, without what depends on the clock."""
    result = compare(
        MIXTURE.reverse(VPSDE()),
        solvers,
        nfe=(4, 8),
        rtol=(1e-2,),
        shape=(2,),
        n=7,
        repetitions=2,
        refine=2,
        tolerance=1e-7,
        samples=lambda n, seed: MIXTURE.sample(n, torch.Generator().manual_seed(seed)),
        batch_size=batch_size,
        dtype=torch.float64,
        min_run_time=0.0,
        path=path,
        progress=False,
        **options,
    )
    return [{k: v for k, v in row.items() if k not in TIMES} for row in result.rows]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 16])
def test_figures_are_those_of_one_process(tmp_path, batch_size):
    """Bitwise where the batches are the same, in float64 to 1e-9 otherwise (1e-16 of rounding through adaptive steps,
    references and distances); both processes know them, one file holds them, and either number of processes goes on
    with it."""
    file = tmp_path / "runs.jsonl"
    one, two = in_processes(2, compared, str(file), batch_size, SOLVERS)
    alone = compared(None, batch_size, SOLVERS)
    assert one == two and len(alone) == 11
    assert {row["status"] for row in alone} == {"ok", "skipped"}
    for mine, theirs in zip(one, alone, strict=True):
        if batch_size == 2:
            assert mine == theirs
        assert {k: v for k, v in mine.items() if not isinstance(v, float)} == {
            k: v for k, v in theirs.items() if not isinstance(v, float)
        }
        for name, value in mine.items():
            assert not isinstance(value, float) or value == pytest.approx(theirs[name], rel=1e-9, abs=1e-12)
    written = file.read_text()
    assert written.count("processes 2") == len(written.splitlines()) - 1 == 22
    again = compared(str(file), batch_size, SOLVERS)
    assert again == one
    new = file.read_text().removeprefix(written).splitlines()
    assert len(new) == 2 and all('"skipped"' in line for line in new)  # what did not work is tried again
    (more, _) = in_processes(2, compared, str(file), batch_size, f"{SOLVERS}, ddim")
    assert more[: len(one)] == one and len(more) == len(one) + 2


def test_a_solver_that_fails_in_one_process_costs_its_row():
    one, two = in_processes(2, compared, None, 2, Bad())
    assert one == two and [(row["status"], row["reason"]) for row in one] == [
        ("failed", "FloatingPointError: of this process only")
    ] * 2
