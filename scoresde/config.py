"""Configurations: defaults, files found by name or path, overrides, JSON, and the objects they stand for.

A configuration file is Python with a function `get_config` that starts from `defaults()` and states what differs.
Every table (SDEs, networks, data, solvers, grids) has a section with a `name` and one sub-section per entry, filled
with the defaults of that entry's constructor: ``--config.sde.name=ve --config.sde.ve.sigma_max=20``. A new table
entry has its options here without a line of code.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
from absl import flags
from ml_collections import config_dict
from ml_collections.config_flags import config_flags

from scoresde.storage.files import one_line, read_json, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from scoresde.data import Dataset
    from scoresde.data.spec import DataSpec
    from scoresde.models.score_model import ScoreModel
    from sde_lib import Law, ReverseSDE
    from solvers import Grid, Solver

_HERE = Path(__file__).resolve().parent
ROOTS = (_HERE.parent / "configs", _HERE / "configs")
"""Where named configurations live: the checkout, then the installed package."""

_FROM_DATA = frozenset({"shape", "num_classes"})
_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple, "Sequence": tuple}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""


# --- defaults ---------------------------------------------------------------------------------------------------------
def defaults() -> ml_collections.ConfigDict:
    """All fields with their defaults, locked: a misspelt field is an error."""
    from scoresde.data import DATASETS
    from scoresde.networks import NETWORKS
    from sde_lib import SDES
    from solvers import GRIDS, SOLVERS

    c = ml_collections.ConfigDict()
    c.seed = 0

    c.sde = _section("vp", SDES)
    c.sde.chain = config_dict.placeholder(int)  # number of levels of a discrete chain (DDPM, SMLD); unset: the SDE

    c.network = _section("unet", NETWORKS, _FROM_DATA)

    c.model = ml_collections.ConfigDict()
    c.model.parameterization = "v"
    c.model.noise_level = "quarter_log_sigma"
    c.model.sigma_data = 0.5
    c.model.input_scaling = "unit"

    c.data = _section("digits", DATASETS)
    c.data.shape = config_dict.placeholder(tuple)  # (C, H, W) that an experiment is for; other data are refused

    c.training = t = ml_collections.ConfigDict()
    t.batch_size = 128  # samples per optimizer step, over all devices and accumulated parts
    t.steps = 10_000
    t.max_seconds = 0.0  # wall-time budget instead of `steps`, not bitwise reproducible; 0: none
    t.weighting = "uniform"
    t.times = "uniform"
    t.log_sigma_mean, t.log_sigma_std = -1.2, 1.2  # of times="lognormal"
    t.reduce = "mean"
    t.flip = False  # mirror half of the images
    t.class_dropout = 0.1  # fraction of samples trained without their class, for guidance and unconditional use
    t.optimizer = "adamw"
    t.learning_rate = 1e-3
    t.beta1, t.beta2, t.eps = 0.9, 0.999, 1e-8
    t.weight_decay = 0.0
    t.warmup = 100  # steps
    t.decay = "constant"
    t.clip = 1.0  # global gradient norm; 0: no clipping
    t.ema_decay = 0.999
    t.accumulation = 1  # parts per optimizer step
    t.precision = "none"
    t.channels_last = False  # images with their channels last in memory: faster convolutions on most devices
    t.compile = False  # torch.compile the network: minutes at the start, then faster steps
    t.cpu = False  # stay on the CPU even if there is an accelerator
    t.log_every = 50
    t.eval_every = 500  # held-out loss; 0: never
    t.eval_samples = 1024
    t.sample_every = 2000  # sample grid; 0: never
    t.checkpoint_every = 2000  # and at the end; 0: at the end only
    t.keep = 2
    t.tensorboard = True

    c.sampling = s = ml_collections.ConfigDict()
    s.n = 64
    s.batch_size = 256
    s.seed = 0
    s.solver = _section("heun", SOLVERS)
    s.grid = _section("blended", GRIDS)  # the default grid everywhere; a chain has its own levels
    s.steps = 18  # ignored by adaptive solvers
    s.nfe = config_dict.placeholder(int)  # budget of network calls per sample, instead of `steps`
    s.end = "denoise"
    s.guidance = 1.0  # classifier-free guidance scale; 1: none

    c.likelihood = _likelihood()
    c.lock()
    return c


def _likelihood() -> ml_collections.ConfigDict:
    """How many held-out samples are scored, and the options of `bits_per_dim` and `log_likelihood`."""
    from scoresde.likelihood import bits_per_dim, log_likelihood

    c = ml_collections.ConfigDict()
    c.n = config_dict.placeholder(int)  # held-out samples; unset: all
    skip = {"levels", "path", "resume", "progress", "joint", "differentiable", "check", "keep"}
    kinds = {"int | None": int, "float | None": float}
    for function in (bits_per_dim, log_likelihood):
        for option in inspect.signature(function).parameters.values():
            if option.name in skip:
                continue
            if isinstance(option.default, bool | int | float | str):
                c[option.name] = option.default
            elif option.default is None and option.annotation in kinds:
                c[option.name] = config_dict.placeholder(kinds[option.annotation])
    del c["sigma_data"]  # the model's own
    return c


def _section(name: str, table: Mapping[str, Any], skip: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """`name`, and a sub-section of constructor defaults for every entry of a table."""
    section = ml_collections.ConfigDict({"name": name})
    for key, cls in table.items():
        section[key] = ml_collections.ConfigDict()
        for option in inspect.signature(cls).parameters.values():
            if option.name in skip or option.kind in (option.VAR_POSITIONAL, option.VAR_KEYWORD):
                continue
            if option.default is None or option.default is option.empty:
                section[key][option.name] = config_dict.placeholder(_kind(option.annotation))
            elif isinstance(option.default, list | tuple):
                section[key][option.name] = tuple(option.default)
            elif isinstance(option.default, bool | int | float | str):
                section[key][option.name] = option.default
            # an object as default has no place in a file: such an option is for code only
    return section


def _kind(annotation: Any) -> type:
    """Type of an optional field, from an annotation such as ``float | None`` (a type, or its text)."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    for part in str(text).split("|"):
        found = _TYPES.get(part.strip().split("[")[0].rsplit(".", 1)[-1])
        if found is not None:
            return found
    return object


# --- files and overrides ----------------------------------------------------------------------------------------------
def known() -> list[str]:
    """Names of the shipped configurations."""
    # a file whose name begins with _ is a base that others load
    files = (f.relative_to(r) for r in ROOTS if r.is_dir() for f in r.rglob("*.py") if f.name[0] not in "_.")
    return sorted({f.with_suffix("").as_posix() for f in files})


def find(name: str) -> Path:
    """File of a configuration: a path ending in .py or .json, or the name of a shipped one.

    Raises:
        ConfigError: if there is none; close names are listed.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"A configuration is named by a text, or the path of a file, got {type(name).__name__}.")
    name, path = str(name), Path(name)
    if path.suffix in (".py", ".json"):
        if path.is_file():
            return path.resolve()
        for root in ROOTS:
            if (root / path).is_file():
                return root / path
        raise ConfigError(f"No configuration file {name!r}; shipped by name: {_listed()}.")
    for root in ROOTS:
        candidate = root / f"{name}.py"
        if candidate.is_file():
            return candidate
    near = difflib.get_close_matches(name, known(), 3)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ConfigError(f"Unknown configuration {name!r}; known: {_listed()}, or a path ending in .py.{meant}")


def _listed() -> str:
    """Names for an error message: those of published experiments, in folders, are too many."""
    names = known()
    plain = [name for name in names if "/" not in name]
    more = len(names) - len(plain)
    return ", ".join(plain) + (f" and {more} of published experiments (`scoresde configs`)" if more else "")


def load(name: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """A configuration by name or path, with overrides as on the command line, locked.

    Args:
        name: see `find`.
        overrides: e.g. ``["--config.training.batch_size=64", "--config.network.unet.multipliers=(1,2)"]``.

    Raises:
        ConfigError: for an unknown file, a file that does not work, a misspelt field or a value of the wrong type.
    """
    path = find(name)
    return override(restore(path) if path.suffix == ".json" else _execute(path), overrides)


def override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """`config` with fields replaced, in the grammar of ml_collections' config_flags.

    Raises:
        ConfigError: for an argument that is no override, a misspelt field or a value of the wrong type.
    """
    for argument in overrides:
        field = _field(argument) if isinstance(argument, str) else None
        if field is None:
            raise ConfigError(f"Unknown argument {argument!r}; overrides look like --config.training.batch_size=64.")
        _check_field(config, field)
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


def _check_field(config: ml_collections.ConfigDict, field: str) -> None:
    """Raise a one-line error with the nearest name if there is no such field."""
    here: Any = config
    parts = field.split(".")
    for i, part in enumerate(parts):
        if not isinstance(here, ml_collections.ConfigDict):
            raise ConfigError(f"config.{'.'.join(parts[:i])} is a value and has no field {part!r}.")
        part = part.split("[")[0]
        if part not in here.keys():
            raise ConfigError(_no_field(config, ".".join(parts[:i]), part, list(here.keys())))
        here = here[part]
    if isinstance(here, ml_collections.ConfigDict):
        raise ConfigError(f"config.{field} is a section; set one of its fields: {', '.join(here.keys())}.")


def _no_field(config: ml_collections.ConfigDict, section: str, part: str, present: list[str]) -> str:
    where = f"config.{section}" if section else "config"
    near = difflib.get_close_matches(part, present, 1)
    if near:
        return f"{where} has no field {part!r}. Did you mean {near[0]!r}?"
    leaves = [path for path, _ in flatten(config)]
    elsewhere = [path for path in leaves if path.rsplit(".", 1)[-1] == part]
    if not elsewhere:
        last = difflib.get_close_matches(part, {path.rsplit(".", 1)[-1] for path in leaves}, 1)
        elsewhere = [path for path in leaves if last and path.rsplit(".", 1)[-1] == last[0]]
    if elsewhere:
        return f"{where} has no field {part!r}. Did you mean config.{elsewhere[0]}?"
    return f"{where} has no field {part!r}; it has {', '.join(present)}."


def _execute(path: Path) -> ml_collections.ConfigDict:
    """Run a configuration file; loaded by path, so that files of the same name in two places do not mix."""
    spec = importlib.util.spec_from_file_location(f"_scoresde_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{path}: get_config() must return a ConfigDict, got {type(config).__name__}.")
    known_fields = defaults()
    for field, _ in flatten(config):
        _check_field(known_fields, field)
    return config.lock()


def _explain(error: Exception) -> str:
    """One line for an error in a configuration file; a field that does not exist gets a suggestion."""
    text = one_line(error)
    if isinstance(error, AttributeError | KeyError) and 'Key "' in text:
        part = text.split('Key "', 1)[1].split('"', 1)[0]
        names = {piece for path, _ in flatten(defaults()) for piece in path.split(".")}
        near = difflib.get_close_matches(part, names, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        return f"there is no field {part!r}.{meant}"
    return f"{type(error).__name__}: {text}"


# --- JSON -------------------------------------------------------------------------------------------------------------
def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field."""
    for key in config.keys():
        if isinstance(config[key], ml_collections.ConfigDict):
            yield from flatten(config[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", config[key]


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain nested dictionary for JSON: tuples as lists, infinities as "inf"."""
    return {k: to_dict(v) if isinstance(v, ml_collections.ConfigDict) else _plain(v) for k, v in config.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_dict(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Inverse of `to_dict`, over the defaults of this version.

    Raises:
        ConfigError: for fields that do not exist or values of the wrong type.
    """
    config = defaults()
    _fill(config, config, values, "")
    return config


def _fill(root: ml_collections.ConfigDict, here: ml_collections.ConfigDict, values: Any, path: str) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.{path.rstrip('.')} is a section, got {values!r}.")
    for key, value in values.items():
        if key not in here.keys():
            raise ConfigError(_no_field(root, path.rstrip("."), key, list(here.keys())))
        if isinstance(here[key], ml_collections.ConfigDict):
            _fill(root, here[key], value, f"{path}{key}.")
            continue
        if value in ("inf", "-inf", "nan") and here.get_type(key) is float:
            value = float(value)
        try:
            here[key] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.{path}{key}: {one_line(error)}") from error


def save(config: ml_collections.ConfigDict, path: str | Path) -> None:
    """Write a configuration as JSON, atomically."""
    write_whole(path, json.dumps(to_dict(config), indent=1, allow_nan=False) + "\n")


def restore(path: str | Path) -> ml_collections.ConfigDict:
    """Read what `save` wrote.

    Raises:
        ConfigError: for a file that is not JSON or does not fit.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read {path}: {one_line(error)}") from error
    return from_dict(values)


def differences(a: ml_collections.ConfigDict, b: ml_collections.ConfigDict) -> list[str]:
    """Dotted paths of the fields in which two configurations differ.

    The options of table entries that neither of the two uses do not count.
    """
    left, right = dict(flatten(a)), dict(flatten(b))
    differ = [p for p in sorted({*left, *right}) if _plain(left.get(p)) != _plain(right.get(p))]
    return [p for p in differ if _used(a, p) or _used(b, p)]


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raise a `ConfigError` that names the first field in use that is NaN, which every comparison lets through."""
    for path, value in flatten(config):
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(v, float) and math.isnan(v) for v in values) and _used(config, path):
            raise ConfigError(f"config.{path} is not a number, got {value!r}.")


def _used(config: ml_collections.ConfigDict, path: str) -> bool:
    """Whether a field lies in no sub-section of an entry that is not named."""
    here = config
    for part in path.split(".")[:-1]:
        if "name" in here.keys() and part != here["name"]:
            return False
        here = here[part]
    return True


# --- what the sections stand for --------------------------------------------------------------------------------------
def build(table: Mapping[str, Any], section: ml_collections.ConfigDict, what: str, **given: Any) -> Any:
    """`sde_lib.build` for a section: unset fields are left to the constructor.

    Raises:
        ConfigError: for an unknown name or options that the constructor refuses.
    """
    from sde_lib import build as build_entry

    name = section["name"]
    options = section.get(name)
    plain = _set(options) if isinstance(options, ml_collections.ConfigDict) else {}
    try:
        return build_entry(table, {"name": name, name: plain}, what, **given)
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


def model_config(config: ml_collections.ConfigDict, spec: DataSpec) -> dict[str, Any]:
    """What `ScoreModel.from_config` takes."""
    from scoresde.networks import NETWORKS
    from sde_lib import SDES

    name = config.network.name
    lookup_entry(NETWORKS, name, "network")
    options = {**to_dict(config.network[name]), "shape": list(spec.shape), "num_classes": spec.num_classes}
    sde = config.sde.name
    lookup_entry(SDES, sde, "sde")
    return {
        **to_dict(config.model),
        "network": {"name": name, name: _set(options)},
        "sde": {"name": sde, sde: _set(to_dict(config.sde[sde]))},
        "levels": config.sde.chain or 0,
        "data_spec": {**asdict(spec), "shape": list(spec.shape)},
    }


def make_model(config: ml_collections.ConfigDict, spec: DataSpec) -> ScoreModel:
    """The score model with fresh weights, drawn from torch's global generator."""
    from scoresde.models.score_model import ScoreModel

    try:
        return ScoreModel.from_config(model_config(config, spec))
    except (TypeError, ValueError) as error:
        raise ConfigError(one_line(error)) from error


def lookup_entry(table: Mapping[str, Any], name: str, what: str) -> Any:
    """Entry of a table, or a `ConfigError` that lists the names."""
    from sde_lib import lookup

    try:
        return lookup(table, name, what)
    except ValueError as error:
        raise ConfigError(one_line(error)) from error


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are set: the others are left to the constructor."""
    return {k: v for k, v in options.items() if v is not None}


def make_solver(config: ml_collections.ConfigDict) -> Solver:
    """The solver of `sampling.solver`."""
    from solvers import SOLVERS

    return build(SOLVERS, config.sampling.solver, "solver")


def make_grid(config: ml_collections.ConfigDict) -> Grid | None:
    """The grid of `sampling.grid`, or None for the law's own."""
    from solvers import GRIDS

    return build(GRIDS, config.sampling.grid, "grid") if config.sampling.grid.name else None
