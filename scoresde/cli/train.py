"""``scoresde train``."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Train a model, or continue a run."


def arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--config", required=True, metavar="NAME", help="shipped configuration, or a .py or .json file")
    p.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run; continued if it holds one")
    p.add_argument("--no-resume", action="store_true", help="refuse a folder that holds a run")


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Train, and say how far it came."""
    from scoresde import config
    from scoresde.storage.processes import process
    from scoresde.training import train

    settings = config.load(arguments.config, overrides)
    result = train(settings, arguments.workdir, resume=not arguments.no_resume)
    if process()[0] == 0:
        folder = Path(arguments.workdir) / "checkpoints"
        print(f"{result.step} steps in {result.seconds:.0f} s; checkpoints in {folder}")
