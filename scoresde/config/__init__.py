"""Configurations: defaults, files found by name or path, overrides, JSON, and the objects they stand for.

A configuration file is Python with a function `get_config` that starts from `defaults()` and states what differs.
Every table (SDEs, networks, data, solvers, grids) has a section with a `name` and one sub-section per entry, filled
with the defaults of that entry's constructor: ``--config.sde.name=ve --config.sde.ve.sigma_max=20``. A new table
entry has its options here without a line of code.
"""

from scoresde.config.defaults import defaults
from scoresde.config.doors import (
    build,
    lookup_entry,
    make_codec,
    make_data,
    make_exact,
    make_law,
    make_model,
    make_objective,
    model_config,
)
from scoresde.config.errors import ConfigError
from scoresde.config.fields import check_numbers, differences, flatten
from scoresde.config.files import ROOTS, find, known, load
from scoresde.config.overrides import override
from scoresde.config.sampling import Sampling, make_grid, make_sampling, make_solver
from scoresde.config.sections import use
from scoresde.config.stored import from_dict, restore, save, to_dict

__all__ = [
    "ROOTS",
    "ConfigError",
    "Sampling",
    "build",
    "check_numbers",
    "defaults",
    "differences",
    "find",
    "flatten",
    "from_dict",
    "known",
    "load",
    "lookup_entry",
    "make_codec",
    "make_data",
    "make_exact",
    "make_grid",
    "make_law",
    "make_model",
    "make_objective",
    "make_sampling",
    "make_solver",
    "model_config",
    "override",
    "restore",
    "save",
    "to_dict",
    "use",
]
