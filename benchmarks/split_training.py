"""Training over several processes and accumulated parts against training in one: sums in another order, no more.

    python benchmarks/split_training.py

The objectives of the table, and those of `tests/scoresde/toy_objectives.py` (two phases with a gradient penalty, a
target that is an average, a frozen teacher), on points of the plane in float64: the largest difference of any weight,
average or moment after 6 steps, relative to the largest entry of its tensor. "2 -> 1" is a run that was begun by two
processes and interrupted, and finished by one. Then the losses of 5 steps on digits in float32, dequantized, mirrored,
with half of the classes left out. The processes are forked and talk by gloo.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "scoresde"))

from test_objective_runs import CASES, begin, digits, everything, in_processes, run

SPLITS = [(1, 4), (2, 1), (2, 4), (4, 1), (4, 4)]
"""Processes, accumulated parts."""


def difference(one: Path, other: Path) -> float:
    """The largest of all tensors of two runs."""
    tensors, others = everything(one)[0], everything(other)[0]
    return max(
        float((value - others[file][name]).abs().max() / value.abs().max().clamp(min=1e-3))
        for file, values in tensors.items()
        for name, value in values.items()
    )


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, make in CASES.items():
            run(root / name, make())
        for world, parts in SPLITS:

            def work(world: int = world, parts: int = parts) -> None:
                for name, make in CASES.items():
                    run(root / f"{name} {world} x {parts}", make(), accumulation=parts)

            work() if world == 1 else in_processes(world, work)

        def beginning() -> None:
            for name, make in CASES.items():
                begin(root / f"{name} 2 -> 1", make())

        in_processes(2, beginning)
        columns = [*(f"{world} x {parts}" for world, parts in SPLITS), "2 -> 1"]
        print(f"| processes x parts | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, make in CASES.items():
            run(root / f"{name} 2 -> 1", make())
            found = [difference(root / name, root / f"{name} {column}") for column in columns]
            print(f"| {name} | {' | '.join(f'{value:.1e}' for value in found)} |")

        digits(root / "digits")
        losses = {"1 x 1": [r["loss"] for r in everything(root / "digits")[2] if "loss" in r]}
        for world, parts in SPLITS:
            place = root / f"digits {world} x {parts}"
            if world == 1:
                digits(place, parts)
            else:
                in_processes(world, lambda place=place, parts=parts: digits(place, parts))  # type: ignore[misc]
            losses[f"{world} x {parts}"] = [r["loss"] for r in everything(place)[2] if "loss" in r]
        print("\n| digits, float32 | losses of steps 1 to 5 | largest relative difference |\n|---|---|---|")
        for split, values in losses.items():
            worst = max(abs(a / b - 1.0) for a, b in zip(values, losses["1 x 1"], strict=True))
            print(f"| {split} | {', '.join(f'{value:.7f}' for value in values)} | {worst:.1e} |")


if __name__ == "__main__":
    main()
