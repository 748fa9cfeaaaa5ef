"""``scoresde likelihood``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoresde.cli.conditions import add_conditions, add_given, condition_of_data
from scoresde.cli.output import drawn
from scoresde.cli.runs import from_run, open_run

if TYPE_CHECKING:
    from scoresde import ScoreModel
    from scoresde.data import Split

HELP = "Score held-out data under a trained model, in bits/dim."


def arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    from_run(p)
    p.add_argument("--n", type=int, metavar="N", help="number of held-out samples (likelihood.n; default: all)")
    p.add_argument("--seed", type=int, metavar="N", help="noise (likelihood.seed)")
    add_given(p)
    add_conditions(p)
    p.add_argument("--elbo", action="store_true", help="the variational bound, too (on a chain it is the only figure)")
    p.add_argument("--convergence", action="store_true", help="how 8 samples settle with steps and with probes, too")
    p.add_argument("--out", metavar="DIR", help="folder of the results (default: `likelihood` in the run, or here)")
    p.add_argument("--restart", action="store_true", help="score anew what the folder holds already")


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Score held-out data: a row per sample, a summary and pictures."""
    import json

    from scoresde.data.conditions import mapped
    from scoresde.likelihood import bits_per_dim, elbo_of_data
    from scoresde.likelihood.pictures import budget, convergence, histogram
    from scoresde.storage.files import write_whole
    from scoresde.storage.processes import process, together
    from sde_lib import Chain

    model, scored, condition, options = together(lambda: _prepared(arguments, overrides))
    data = scored.data
    out = Path(arguments.out or Path(arguments.workdir or ".") / "likelihood")
    summary: dict[str, Any] = {}
    pictures: dict[str, Callable[[Path], object]] = {}
    if not isinstance(model.law, Chain):
        result = bits_per_dim(
            model, data, condition=condition, path=out / "likelihood.csv", resume=not arguments.restart, **options
        )
        _say(f"{len(data)} held-out samples: {result}")
        summary = result.summary()
        pictures["likelihood.png"] = lambda path: histogram(result, path)
        pictures["budget.png"] = lambda path: budget(result, path)
    if arguments.elbo or isinstance(model.law, Chain):
        kept = {name: options[name] for name in ("seed", "batch_size")}
        bound = elbo_of_data(model, data, condition=condition, **kept)
        _say(f"{len(data)} held-out samples: {bound}")
        summary["elbo"] = bound.summary()
    if process()[0] > 0:
        return
    if arguments.convergence and not isinstance(model.law, Chain):
        given = mapped(lambda value: value[:8].to(model.device), condition)
        x = model.encode(data[:8].to(model.device)).to(model.dtype)
        settled = convergence(model.reverse(given), x, seed=options["seed"], sigma_data=model.sigma_data)
        print(settled.table())
        summary["convergence"] = vars(settled)
        pictures["convergence.png"] = settled.plot
    write_whole(out / "likelihood.json", json.dumps(summary, indent=1) + "\n")
    written = ["likelihood.json", *(["likelihood.csv"] if pictures else []), *drawn(pictures, out)]
    print(f"written to {out}: {', '.join(written)}")


def _prepared(
    arguments: argparse.Namespace, overrides: list[str]
) -> tuple[ScoreModel, Split, dict[str, Any], dict[str, Any]]:
    """Model, what is scored, its conditions, and how."""
    from scoresde import config

    settings, model, _ = open_run(arguments, overrides)
    options = {k: v for k, v in settings.likelihood.items() if v is not None}
    for name in ("n", "seed"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    n = options.pop("n", None)
    held_out = config.make_data(settings).held_out
    if n is not None and not 1 <= n <= len(held_out):
        raise ValueError(f"likelihood.n must be in 1 … {len(held_out)} (the held-out samples), got {n}.")
    scored = held_out.rows(slice(n))
    return model, scored, condition_of_data(arguments, scored, model.data_spec), options


def _say(text: str) -> None:
    """A line of the first process."""
    from scoresde.storage.processes import process

    if process()[0] == 0:
        print(text)
