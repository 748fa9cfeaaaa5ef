"""``scoresde sample``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoresde.cli.conditions import add_conditions, condition_of, given_conditions
from scoresde.cli.runs import from_run, open_run

if TYPE_CHECKING:
    from ml_collections import ConfigDict
    from torch import Tensor

    from scoresde import ScoreModel

HELP = "Draw samples from a trained model."


def arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    from_run(p)
    p.add_argument("--out", metavar="FILE", help=".png, .npy or .npz (default: samples.png in the run, or here)")
    p.add_argument("--solver", metavar="NAME", help="solver (sampling.solver.name)")
    p.add_argument("--steps", type=int, metavar="N", help="number of steps (sampling.steps)")
    p.add_argument("--nfe", type=int, metavar="N", help="budget of network calls per sample, instead of --steps")
    p.add_argument("--n", type=int, metavar="N", help="number of samples (sampling.n)")
    p.add_argument("--seed", type=int, metavar="N", help="noise (sampling.seed)")
    add_conditions(p)
    p.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance scale (sampling.guidance)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Draw samples into a file."""
    from scoresde.storage.processes import process, together
    from scoresde.training import draw_samples

    settings, model, file, out, condition = together(lambda: _prepared(arguments, overrides))
    samples = draw_samples(model, settings, condition=condition, progress=None)
    if process()[0] > 0:
        return
    _write(samples.data, condition, model, out)
    print(
        f"{len(samples.data)} samples by {settings.sampling.solver.name}, "
        f"{samples.nfe.double().mean():.4g} network calls each, {samples.seconds:.1f} s, from {file}: {out}"
    )


def _prepared(
    arguments: argparse.Namespace, overrides: list[str]
) -> tuple[ConfigDict, ScoreModel, Path, Path, dict[str, Any]]:
    """Configuration, model and its file, where samples go, and their conditions."""
    import torch

    from scoresde import config
    from scoresde.images import picture

    settings, model, file = open_run(arguments, overrides)
    s = settings.sampling
    for name in ("steps", "nfe", "n", "seed", "guidance"):
        if getattr(arguments, name) is not None:
            s[name] = getattr(arguments, name)
    if arguments.steps is not None and arguments.nfe is not None:
        raise ValueError("Give --steps or --nfe, not both.")
    if arguments.steps is not None:
        s.nfe = None
    if arguments.solver is not None:
        config.use(settings, "sampling.solver", arguments.solver)
    spec = model.data_spec
    out = Path(arguments.out or Path(arguments.workdir or ".") / "samples.png")
    if out.suffix not in (".png", ".npy", ".npz"):
        raise ValueError(f"--out must end in .png, .npy or .npz, got {out.name!r}.")
    if out.suffix == ".png" and picture(torch.zeros(1, *spec.shape), spec) is None:
        raise ValueError(f"Samples of shape {tuple(spec.shape)} have no picture: use --out=samples.npy.")
    return settings, model, file, out, condition_of(given_conditions(arguments), spec, s.n)


def _write(data: Tensor, condition: Mapping[str, Any], model: ScoreModel, out: Path) -> None:
    """Samples as a picture, or as arrays."""
    import numpy as np

    from scoresde.images import picture, save_png

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        image = None if model.data_spec is None else picture(data, model.data_spec)
        if image is not None:
            save_png(image, out)
    elif out.suffix == ".npy":
        np.save(out, data.numpy())
    else:
        np.savez(out, **_arrays(data, condition))


def _arrays(data: Tensor, condition: Mapping[str, Any]) -> dict[str, Any]:
    """Samples and what they were drawn under, as `Arrays` reads them: classes are `labels`, tokens have their mask."""
    arrays = {"data": data.numpy()}
    for name, value in condition.items():
        parts = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        arrays |= {"labels" if k == "class_label" else k: v.numpy() for k, v in parts.items()}
    return arrays
