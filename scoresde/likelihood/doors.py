"""What likelihoods and scorings of data sets refuse: what is no density, labels that do not fit, unknown options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from scoresde.codecs import Codec
from scoresde.data.spec import DataSpec
from scoresde.models.score_model import ScoreModel
from sde_lib._checks import did_you_mean, options_of
from sde_lib.reverse import Reverse


def check_labels(spec: DataSpec, labels: Any, n: int) -> None:
    """Raise unless labels are None or one per sample, and classes of the specification if it has any."""
    if labels is None:
        return
    if spec.num_classes:
        spec.conditions["class_label"].check("class_label", labels)
    elif not isinstance(labels, Tensor):
        raise TypeError(f"`labels` must be a tensor of shape ({n},), got {type(labels).__name__}.")
    if labels.shape != (n,):
        raise ValueError(f"`labels` must have shape ({n},), got {tuple(labels.shape)}.")


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


def check_codec(model: ScoreModel) -> Codec:
    """The codec of a model, which must be a bijection."""
    codec = model.codec
    if codec is None or codec.log_volume is None:
        raise ValueError("The codec of this model is no bijection, so that its data have no density to be scored.")
    return codec
