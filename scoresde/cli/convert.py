"""``scoresde convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Write a published checkpoint as one file of this library's own format."


def arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("source", metavar="SOURCE", help="checkpoint file or folder; of EDM also its network pickles")
    p.add_argument("out", metavar="OUT.safetensors", help="file to write")
    p.add_argument("--config", metavar="NAME", help="experiment of a score_sde_pytorch checkpoint")
    p.add_argument("--preconditioning", metavar="KIND", help="of an EDM state dict: edm, vp, ve or iddpm")
    p.add_argument("--size", type=int, metavar="N", help="side of the images, where the checkpoint does not say it")
    p.add_argument("--raw-weights", action="store_true", help="last weights instead of averaged ones")
    p.add_argument("--continuous", action="store_true", help="the SDE through the levels of a discrete chain")


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Write the file, and say what is in it."""
    from scoresde.pretrained.load import from_edm_pickle, load_pretrained
    from scoresde.storage import save_model

    if Path(arguments.source).suffix == ".pkl":
        model = from_edm_pickle(arguments.source, arguments.continuous)
    else:
        model = load_pretrained(
            arguments.source,
            config=arguments.config,
            overrides=overrides,
            ema=not arguments.raw_weights,
            preconditioning=arguments.preconditioning,
            size=arguments.size,
            continuous=arguments.continuous,
        )
    path = save_model(model, arguments.out)
    config = model.config()
    count = sum(p.numel() for p in model.parameters())
    print(f"{path}: {config['network']['name']}, {count:,} parameters, SDE {config['sde']['name']}")
