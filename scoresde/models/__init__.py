"""Models: a network with its law and everything needed to use it. ``MODELS`` names the kinds that a file can hold."""

from collections.abc import Mapping
from typing import Any

from scoresde.models.score_model import ScoreModel
from sde_lib import Table, lookup

MODELS = Table(ScoreModel, {"score_model": ScoreModel})
"""Kind -> class, a `ScoreModel` or a subclass: what the entry `kind` of a model's configuration says, so that
`load_model` builds the right one."""


def model_from_config(config: Mapping[str, Any]) -> ScoreModel:
    """The model of a configuration, of the kind that it names: see `ScoreModel.from_config`.

    Raises:
        ValueError: for an unknown kind, or a configuration that does not fit it.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"`config` must be a mapping, got {type(config).__name__}.")
    return lookup(MODELS, config.get("kind", "score_model"), "model").from_config(config)


__all__ = ["MODELS", "ScoreModel", "model_from_config"]
