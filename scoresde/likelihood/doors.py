"""What likelihoods and scores of data sets refuse: what is no density, conditions that do not fit, unknown options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from scoresde.codecs import Codec
from scoresde.data.conditions import mapped
from scoresde.models.score_model import ScoreModel
from sde_lib._checks import did_you_mean, options_of
from sde_lib.reverse import DESCRIBES, Reverse

NO_DENSITY = {
    "guided": (
        "this is a guided field, which is the score of none: score the model without its guidance, "
        "model.reverse(condition)"
    ),
    "map": (
        "this is a map from noise to data, which makes samples and has no score: score a model of the density, such as "
        "the one it was distilled from, or judge its samples"
    ),
}
"""`Reverse.describes` -> why there is no likelihood, and what to do."""


def check_density(asked: str, rev: Reverse) -> None:
    """Raise ValueError, with why and what to do, for a reverse that `asked` is not defined for: no density's."""
    if rev.describes not in DESCRIBES:
        known = ", ".join(DESCRIBES)
        raise ValueError(f"`describes` of {type(rev).__name__} must be one of {known}, got {rev.describes!r}.")
    if rev.describes != "density":
        raise ValueError(f"{asked} needs the score of a density, and {NO_DENSITY[rev.describes]}.")


def check_options(scoring: str, function: Callable[..., Any], given: Mapping[str, Any], own: Collection[str]) -> None:
    """Raise for an option that a function does not have, or that the scoring sets itself."""
    known = [name for name in options_of(function) if name not in own]
    for name in given:
        if name not in known:
            raise TypeError(
                f"{scoring} has no option {name!r}.{did_you_mean(name, known)} It takes its own and, of "
                f"{function.__name__}: {', '.join(known)}."
            )


def check_condition(model: ScoreModel, condition: Any, n: int) -> dict[str, Any]:
    """The condition of n samples, {} for None: of what the data specification knows, if it knows any, and a mapping of
    the network's arguments otherwise.

    Raises:
        TypeError, ValueError: for another one, or tensors that have not n rows.
    """
    if model.data_spec is not None and model.data_spec.conditions:
        model.data_spec.check_condition(condition, n)
    else:
        model.check_condition(condition)
    condition = dict(condition or {})
    mapped(lambda value: _check_rows(value, n), condition)
    return condition


def _check_rows(value: Tensor, n: int) -> Tensor:
    if value.ndim and len(value) != n:
        raise ValueError(f"`condition` must have a row per sample at every depth, {n}, got {tuple(value.shape)}.")
    return value


def check_volume(asked: str, codec: Codec) -> float:
    """log |det dx / dz| of a codec, per sample.

    Raises:
        ValueError: for one without, with why and what to do.
    """
    volume = codec.log_volume
    if volume is None:
        raise ValueError(
            f"{asked} needs a codec that is a bijection, and {codec.name!r} is none, so that no density of the data "
            "follows from the model's: score states, log_likelihood(model.reverse(), x), whose units are the codec's."
        )
    return volume
