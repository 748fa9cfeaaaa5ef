"""``scoresde compare``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoresde.cli.conditions import add_conditions, condition_of, given_conditions
from scoresde.cli.output import drawn
from scoresde.cli.runs import from_run, open_run

if TYPE_CHECKING:
    from torch import Tensor

    from scoresde.data import Split

HELP = "Compare solvers on a trained model, or on a toy whose score is known exactly."

_SOLVERS = (
    "comma-separated names with options and grids: heun,dpmpp_3m@uniform_half_log_snr,ddim(eta=0.5)@karras(rho=5); "
    "`recommended` is the best measured one for each budget"
)
_GRID = "grid of solvers without one of their own (default: blended; on a chain, its levels)"
_FEATURES = "of the Fréchet distance: identity, random_relu, or your own function as package.module:function"


def arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    from_run(p, required=False)
    p.add_argument("--solvers", required=True, metavar="LIST", help=_SOLVERS)
    p.add_argument("--nfe", default="5,10,20,50", metavar="LIST", help="budgets of network calls (default: 5,10,20,50)")
    p.add_argument("--rtol", default="1e-1,1e-2,1e-3", metavar="LIST", help="tolerances of adaptive solvers")
    p.add_argument("--grid", metavar="GRID", help=_GRID)
    p.add_argument("--n", type=int, default=256, metavar="N", help="samples per repetition (default: 256)")
    p.add_argument("--batch-size", type=int, metavar="N", help="samples at a time (default: all)")
    p.add_argument("--repetitions", type=int, default=3, metavar="N", help="with other noise each (default: 3)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="starts and noise")
    p.add_argument("--float64", action="store_true", help="double precision states (networks stay as they are)")
    add_conditions(p)
    p.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance scale; needs a condition")
    p.add_argument("--metrics", metavar="LIST", help="distances between samples (default: all)")
    p.add_argument("--features", metavar="NAME", help=_FEATURES)
    p.add_argument("--out", metavar="DIR", help="where results go (default: compare in the run, or here)")
    p.add_argument("--restart", action="store_true", help="start anew instead of going on with what DIR holds")


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Compare, and leave a table and pictures."""
    from scoresde.comparison import compare
    from scoresde.comparison.specs import parse_grid
    from scoresde.storage.processes import process, together

    trained = arguments.workdir or arguments.checkpoint
    problem, options = together(lambda: (_trained if trained else _toy)(arguments, overrides))
    out = Path(arguments.out or Path(arguments.workdir or ".") / "compare")
    result = compare(
        problem,
        arguments.solvers,
        nfe=_numbers("--nfe", arguments.nfe, int),
        rtol=_numbers("--rtol", arguments.rtol, float),
        grid=None if arguments.grid is None else parse_grid(arguments.grid),
        n=arguments.n,
        repetitions=arguments.repetitions,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        metrics=None if arguments.metrics is None else arguments.metrics.split(","),
        features=_features(arguments.features),
        path=out,
        resume=not arguments.restart,
        **options,
    )
    if process()[0] > 0:
        return
    result.to_csv(out / "compare.csv")
    result.to_json(out / "compare.json")
    print(result.table())
    pictures = drawn({"compare.png": result.plot, "samples.png": result.sheet}, out)
    print(f"{', '.join(['compare.csv', 'compare.json', *pictures])} in {out}")


def _trained(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """A trained model, perhaps under a class and guidance, and what its samples should be like."""
    import torch

    from scoresde import config

    settings, model, _ = open_run(arguments, overrides)
    data = config.make_data(settings)
    options: dict[str, Any] = {"dtype": torch.float64 if arguments.float64 else torch.float32}
    condition = condition_of(given_conditions(arguments), model.data_spec, arguments.n)
    if condition:
        options["condition"] = condition
    if arguments.guidance is not None:
        if not condition:
            raise ValueError("--guidance needs a condition to guide to: give --class or --condition.NAME too.")
        options["guidance"] = arguments.guidance
    held_out, train = (_of_its_class(part, condition) for part in (data.held_out, data.train))
    return model, {**options, "samples": held_out, "floor": train}


def _of_its_class(split: Split, condition: Mapping[str, Any]) -> Tensor:
    """The samples of the class that all are drawn under; all samples where there is no such class."""
    label, labels = condition.get("class_label"), split.condition.get("class_label")
    if label is None or labels is None or not (label == label[0]).all():
        return split.data
    return split.data[labels == label[0]]


def _toy(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """A density whose score is known, in double precision."""
    import torch

    from scoresde import config
    from scoresde.storage import usable_device

    if arguments.config is None:
        raise ValueError("Give a trained model (--workdir or --checkpoint), or --config of a toy with a known density.")
    if given_conditions(arguments) or arguments.guidance is not None:
        raise ValueError("Conditions and --guidance are for trained models (--workdir or --checkpoint).")
    problem, shape, draw = config.make_exact(config.load(arguments.config, overrides))
    device = usable_device(arguments.device or "cpu")
    return problem, {"shape": shape, "samples": draw, "dtype": torch.float64, "device": device}


def _features(text: str | None) -> Any:
    """A name, or the function that ``package.module:function`` says."""
    if text is None or ":" not in text:
        return text
    from importlib import import_module

    module, _, name = text.partition(":")
    try:
        return getattr(import_module(module), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"--features={text} cannot be imported: {error}") from error


def _numbers(flag: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} takes numbers separated by commas, got {text!r}.") from None
