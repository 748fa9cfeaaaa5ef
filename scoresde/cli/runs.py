"""A trained run, as the commands that need one are told about it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def from_run(p: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that say which model is meant, and where it runs."""
    source = p.add_mutually_exclusive_group(required=required)
    source.add_argument("--workdir", metavar="DIR", help="folder of a run: its newest checkpoint")
    source.add_argument("--checkpoint", metavar="PATH", help="a checkpoint folder, or a .safetensors file")
    p.add_argument("--config", metavar="NAME", help="configuration (default: the one of the run)")
    p.add_argument("--raw-weights", action="store_true", help="last weights instead of averaged ones")
    p.add_argument("--device", default=None, metavar="DEV", help="cpu, cuda, … (default: cuda if there is one)")


def open_run(arguments: argparse.Namespace, overrides: list[str]) -> tuple[ConfigDict, Any, Path]:
    """Configuration and model of a trained run, and the model's file."""
    import torch

    from scoresde import config
    from scoresde.storage import find_model, load_model

    ema = not arguments.raw_weights
    source = arguments.checkpoint or arguments.workdir
    file = find_model(source, ema)
    saved = next((p for p in (file.parent / "config.json", *_above(file)) if p.is_file()), None)
    if arguments.config:
        settings = config.load(arguments.config, overrides)
    else:
        settings = config.override(config.restore(saved) if saved else config.defaults(), overrides)
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one for every process that torchrun starts
    device = arguments.device or (own if torch.cuda.is_available() else "cpu")
    model = load_model(file, device=device)
    if model.data_spec is None:
        raise ValueError(f"The model in {file} has no data specification, so its samples have no shape.")
    return settings, model, file


def _above(file: Path) -> list[Path]:
    """config.json of the run that a checkpoint folder lies in: workdir/checkpoints/step_…/average.ema.safetensors."""
    return [file.resolve().parents[2] / "config.json"] if len(file.resolve().parents) > 2 else []
