"""What the sections of a configuration stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ml_collections

from scoresde.config.errors import ConfigError
from scoresde.config.stored import to_dict
from scoresde.storage.files import one_line
from sde_lib._checks import section_key

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scoresde.codecs import Codec
    from scoresde.data import Dataset
    from scoresde.data.spec import DataSpec
    from scoresde.models.score_model import ScoreModel
    from scoresde.objectives import Objective
    from sde_lib import Law, ReverseSDE


def build(table: Mapping[str, Any], section: ml_collections.ConfigDict, what: str, **given: Any) -> Any:
    """`sde_lib.build` for a section: unset fields are left to the constructor, sections in it are built, too.

    Raises:
        ConfigError: for an unknown name or options that the constructor refuses.
    """
    from sde_lib import build as build_entry

    try:
        return build_entry(table, chosen(section), what, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(one_line(error)) from error


def make_law(config: ml_collections.ConfigDict) -> Law:
    """The forward SDE, or its chain if `sde.chain` is set."""
    from sde_lib import SDES

    sde = build(SDES, config.sde, "sde")
    if config.sde.chain is None:
        return sde
    try:
        return sde.discretize(config.sde.chain)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def make_data(config: ml_collections.ConfigDict) -> Dataset:
    """The data set, loaded and split.

    Raises:
        ConfigError: if it cannot be read; ImportError if a package is missing.
    """
    from scoresde.data import DATASETS

    source = build(DATASETS, config.data, "data set")
    try:
        dataset = source.load()
    except (OSError, ValueError) as error:
        raise ConfigError(one_line(error)) from error
    wanted = config.data.shape
    if wanted is not None and dataset.spec.shape != tuple(wanted):
        raise ConfigError(f"This experiment is for data of shape {tuple(wanted)}, got {dataset.spec.shape}.")
    return dataset


def make_exact(
    config: ml_collections.ConfigDict,
) -> tuple[ReverseSDE, tuple[int, ...], Callable[[int, int], Tensor]]:
    """For a toy that is a Gaussian mixture: its exact reverse SDE, its shape, and (count, seed) -> exact samples.

    Raises:
        ConfigError: for other data.
    """
    import torch

    from scoresde.data import DATASETS

    source = build(DATASETS, config.data, "data set")
    mixture = getattr(source, "mixture", None)
    if mixture is None:
        known = ", ".join(name for name, cls in DATASETS.items() if hasattr(cls, "mixture"))
        raise ConfigError(
            f"The data set {config.data.name!r} has no score in closed form (those with one: {known}): train a model "
            "and give its --workdir."
        )
    return (
        mixture.reverse(make_law(config)),
        mixture.shape,
        lambda n, seed: mixture.sample(n, torch.Generator().manual_seed(seed), torch.float64),
    )


def make_codec(config: ml_collections.ConfigDict, spec: DataSpec, data: Tensor | None = None) -> Codec:
    """The codec of the `codec` section for data of a specification, measured on `data` (N, *D) where it has to be."""
    from scoresde.codecs import CODECS

    made: Codec = build(CODECS, config.codec, "codec", via="fit", spec=spec, data=data)
    return made


def model_config(config: ml_collections.ConfigDict, spec: DataSpec, codec: Codec) -> dict[str, Any]:
    """What `ScoreModel.from_config` takes."""
    from scoresde.networks import NETWORKS
    from sde_lib import SDES

    lookup_entry(NETWORKS, config.network.name, "network")
    lookup_entry(SDES, config.sde.name, "sde")
    network = chosen(to_dict(config.network))
    conditions = spec.to_dict().get("conditions", {})
    network.setdefault(section_key(network["name"]), {}).update(shape=list(codec.state_shape), conditions=conditions)
    return {
        **to_dict(config.model),
        "network": network,
        "sde": chosen(to_dict(config.sde)),
        "levels": config.sde.chain or 0,
        "data_spec": spec.to_dict(),
        "codec": {"name": codec.name, section_key(codec.name): codec.config()},
    }


def make_model(config: ml_collections.ConfigDict, spec: DataSpec, data: Tensor | None = None) -> ScoreModel:
    """The score model with fresh weights, drawn from torch's global generator, and a codec fitted to `data`."""
    from scoresde.models import model_from_config

    try:
        codec = make_codec(config, spec, data)
        model = model_from_config(model_config(config, spec, codec))
        assert model.codec is not None
        model.codec.load_state_dict(codec.state_dict())
        return model
    except (TypeError, ValueError) as error:
        raise ConfigError(one_line(error)) from error


def make_objective(config: ml_collections.ConfigDict, model: nn.Module) -> Objective:
    """The objective of the section `objective`, for a model."""
    from scoresde.objectives import OBJECTIVES

    made: Objective = build(OBJECTIVES, config.objective, "objective", model=model)
    return made


def lookup_entry(table: Mapping[str, Any], name: str, what: str) -> Any:
    """Entry of a table, or a `ConfigError` that lists the names."""
    from sde_lib import lookup

    try:
        return lookup(table, name, what)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def chosen(section: Mapping[str, Any]) -> dict[str, Any]:
    """The name of a section's entry and those of its options that are set: the others are left to the constructor."""
    name = section["name"]
    found: dict[str, Any] = {"name": name}
    options = section.get(section_key(name))
    if name and isinstance(options, ml_collections.ConfigDict | Mapping):
        inner = {k: chosen(v) if isinstance(v, ml_collections.ConfigDict) else v for k, v in options.items()}
        found[section_key(name)] = {k: v for k, v in inner.items() if v is not None}
    return found
