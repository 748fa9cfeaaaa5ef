"""``scoresde demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Train on handwritten digits, then sample, compare solvers and score held-out data."


def arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--config", default="digits_vp", metavar="NAME", help="configuration (default: digits_vp)")
    p.add_argument("--workdir", default="runs/demo", metavar="DIR", help="where results go (default: runs/demo)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """See `scoresde.demo`."""
    from scoresde import config, demo

    demo.main(Path(arguments.workdir), config.load(arguments.config, overrides))
