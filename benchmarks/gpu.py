"""Correctness and speed on a GPU, in ten minutes; with ``--device=cpu`` a small rehearsal of every section.

    python benchmarks/gpu.py --out=rows.jsonl                        # all sections
    python benchmarks/gpu.py --sections=graphs,compile --out=rows.jsonl
    python benchmarks/gpu.py --device=cpu --out=rows.jsonl           # is the script itself right?

Gates come first: each compares with float64 on the CPU, or lets PyTorch refuse a wait or a capture, and passes or fails
by itself. Every finding is a line of JSON, flushed as it is found, so that an aborted run keeps what it has. Sections
run in another process; when one dies or hangs that is reported, and the next begins in a new one. What is left when the
budget is spent is listed as skipped. The table at the end is read from the file. The exit status is 1 if a gate failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_figures as figures
import gpu_gates as gates
import torch
from gpu_rows import Run

SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "environment": (figures.environment, 0.04),
    "network_agreement": (gates.network_agreement, 0.10),
    "noise": (gates.noise_agreement, 0.02),
    "solvers": (gates.solver_agreement, 0.07),
    "likelihood": (gates.likelihood_agreement, 0.07),
    "waits": (gates.no_waits, 0.05),
    "graphs": (gates.cuda_graphs, 0.05),
    "training": (gates.training, 0.05),
    "compile": (gates.compiled, 0.12),
    "overhead": (figures.overhead, 0.06),
    "networks": (figures.networks, 0.25),
    "sampling": (figures.sampling, 0.14),
    "training_speed": (figures.training, 0.25),
    "likelihood_speed": (figures.likelihoods, 0.12),
}
"""Name -> what it does, and the most of the budget it may take. They add up to more than one: few take all."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The findings so far; a last line that was cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def child(options: argparse.Namespace) -> None:
    """The sections in this process, until one leaves the device unusable."""
    end = time.monotonic() + options.budget
    device = torch.device(options.device)
    for name in options.sections:
        work, share = SECTIONS[name]
        deadline = min(end, time.monotonic() + share * options.total)
        run = Run(device, device.type == "cpu", options.out, deadline, name)
        began = time.monotonic()
        run.do(name, lambda work=work, run=run: work(run))  # type: ignore[misc]
        run.synchronize()  # an error that stays ends this process: the rest begins in another
        run.row("section", "done", seconds=round(time.monotonic() - began, 2))


def parent(options: argparse.Namespace) -> None:
    """Start children until every section was done or given up."""
    start = time.monotonic()
    left = list(options.sections)
    while left:
        rest = options.budget - (time.monotonic() - start)
        if rest <= 0:
            for name in left:
                Run(torch.device("cpu"), True, options.out, 0.0, name).row("section", "skipped", why="out of time")
            return
        command = [sys.executable, __file__, "--child", f"--device={options.device}", f"--out={options.out}",
                   f"--sections={','.join(left)}", f"--budget={rest}", f"--total={options.budget}"]  # fmt: skip
        try:
            why = f"ended with status {subprocess.run(command, check=False, timeout=rest).returncode}"
        except subprocess.TimeoutExpired:
            why = "did not end in its time"
        done = {row["section"] for row in rows_of(options.out) if row["kind"] == "done"}
        left = [name for name in left if name not in done]
        if left:
            run = Run(torch.device("cpu"), True, options.out, 0.0, left.pop(0))
            run.row("section", "gate", ok=False, error=f"the process {why}")


def table(rows: list[dict[str, Any]]) -> str:
    """Figures, then gates by section, what failed and what was skipped, as Markdown."""
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("text", "figure", "gate", "skipped")}
    lines = ["", *(f"{row['section']}: {row['name']}: {_rest(row)}" for row in kinds["text"])]
    lines += ["", "| section | measured | | |", "|---|---|---|---|"]
    for row in kinds["figure"]:
        lines.append(f"| {row['section']} | {row['name']} | {_short(row['value'])} {row['unit']} | {_rest(row)} |")
    lines += ["", "| section | gates passed | largest error / bound |", "|---|---|---|"]
    for section in dict.fromkeys(row["section"] for row in kinds["gate"]):
        found = [row for row in kinds["gate"] if row["section"] == section]
        near = max((row["error"] / row["bound"] for row in found if row["ok"] and row["bound"]), default=0.0)
        lines.append(f"| {section} | {sum(row['ok'] for row in found)} of {len(found)} | {near:.2g} |")
    lines += ["", *(f"FAILED: {r['section']}: {r['name']}: {_rest(r)}" for r in kinds["gate"] if not r["ok"])]
    lines += [f"skipped: {r['section']}: {r['name']} ({r['why']})" for r in kinds["skipped"]]
    passed = sum(row["ok"] for row in kinds["gate"])
    lines.append(f"{passed} of {len(kinds['gate'])} gates passed, {len(kinds['skipped'])} pieces skipped.")
    return "\n".join(lines)


def _rest(row: dict[str, Any]) -> str:
    known = ("section", "name", "kind", "ok", "value", "unit", "batch")
    return ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k not in known)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds, all in all")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="file of rows; must not exist")
    parser.add_argument("--show", action="store_true", help="print the table of an existing file and stop")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--total", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sections = options.sections.split(",")
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.child:
        child(options)
        return
    if not options.show:
        if options.out.exists():
            parser.error(f"{options.out} exists: name another file with --out, or print it with --show")
        parent(options)
    rows = rows_of(options.out)
    print(table(rows))
    sys.exit(any(row["kind"] == "gate" and not row["ok"] for row in rows))


if __name__ == "__main__":
    main()
