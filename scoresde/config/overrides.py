"""Fields replaced as on the command line: ``--config.training.batch_size=64``."""

from __future__ import annotations

from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections.config_flags import config_flags

from scoresde.config.errors import ConfigError
from scoresde.config.fields import check_field
from scoresde.config.sections import name_entries
from scoresde.storage.files import one_line


def override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """`config` with fields replaced, in the grammar of ml_collections' config_flags.

    Where an entry is a class of one's own, ``--config.network.name=my_module:MyNet``, its options are under the name of
    the class: ``--config.network.MyNet.width=32``.

    Raises:
        ConfigError: for an argument that is no override, a misspelt field or a value of the wrong type.
    """
    fields = []
    for argument in overrides:
        field = _field(argument) if isinstance(argument, str) else None
        if field is None:
            raise ConfigError(f"Unknown argument {argument!r}; overrides look like --config.training.batch_size=64.")
        fields.append((field, argument))
    name_entries(config, [(field, argument.partition("=")[2]) for field, argument in fields if field.endswith(".name")])
    for field, _ in fields:
        check_field(config, field)
    if not overrides:
        return config
    values = flags.FlagValues()
    argv = ["scoresde", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"Bad override: {one_line(error)}") from error
    if rest:
        raise ConfigError(f"Unknown argument {rest[0]!r}; write overrides as --config.field=value.")
    return values["config"].value


def _field(argument: str) -> str | None:
    for prefix in ("--config.", "--noconfig."):
        if argument.startswith(prefix):
            return argument[len(prefix) :].split("=", 1)[0]
    return None
