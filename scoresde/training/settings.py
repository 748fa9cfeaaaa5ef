"""Settings of a run: what they may be, and what of them may change between the parts of a run."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from scoresde import config as configs
from scoresde.config import ConfigError
from scoresde.training.optimizers import common_options
from scoresde.training.samples import check_sampling

PRECISIONS = {"none": "no", "bf16": "bf16", "fp16": "fp16"}

# what may change between the parts of a run: it does not touch the steps that were done
_FREE = (
    "sampling.",
    "likelihood.",
    *(f"training.{name}" for name in ("max_seconds", "log_every", "eval_", "sample_every", "checkpoint_every")),
    *(f"training.{name}" for name in ("keep", "tensorboard", "cpu")),
)


def check(config: ConfigDict) -> None:
    """Raise a `ConfigError` for settings of training or sampling that cannot work, before anything is built."""
    if not isinstance(config, ConfigDict):
        raise TypeError(f"`config` must be a configuration, config.load(name), got {type(config).__name__}.")
    t = config.training
    configs.check_numbers(config)
    for name, value in configs.flatten(t):
        if isinstance(value, float) and math.isinf(value):
            raise ConfigError(f"training.{name} must be finite, got {value}.")
    for name in ("batch_size", "steps", "accumulation", "keep", "log_every", "eval_samples"):
        if t[name] < 1:
            raise ConfigError(f"training.{name} must be >= 1, got {t[name]}.")
    for name in ("eval_every", "sample_every", "checkpoint_every"):
        if t[name] < 0:
            raise ConfigError(f"training.{name} must be >= 0, got {t[name]}.")
    common_options(t)
    if not 0.0 <= t.ema_decay < 1.0:
        raise ConfigError(f"training.ema_decay must be in [0, 1), got {t.ema_decay}.")
    if t.max_seconds < 0.0:
        raise ConfigError(f"training.max_seconds must be > 0, or 0 for no budget, got {t.max_seconds}.")
    configs.lookup_entry(PRECISIONS, t.precision, "training.precision")
    check_sampling(config, configs.make_law(config))


def check_same_run(earlier: ConfigDict, config: ConfigDict, workdir: object, paced: bool) -> None:
    """Raise a `ConfigError` that names the settings in which a run differs from the one that it is to continue; its
    length, too, if that shaped the steps that were done (`paced`)."""
    free = _FREE if paced else (*_FREE, "training.steps")
    bad = [field for field in configs.differences(earlier, config) if not field.startswith(free)]
    if bad:
        was, now = dict(configs.flatten(earlier)), dict(configs.flatten(config))
        shown = ", ".join(f"{field} was {was.get(field)!r} and is {now.get(field)!r}" for field in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ConfigError(
            f"The run in {workdir} has another configuration: {shown}{more}. Choose another --workdir, or use its "
            "config.json."
        )
