"""The configuration of a score model that was put together in code, where its objects say how they are built."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from sde_lib import SDE, Chain
from sde_lib._checks import full_name, section_key


def described(network: nn.Module, law: SDE | Chain) -> dict[str, Any] | None:
    """The entries `network`, `sde` and `levels` of a configuration, or None if they cannot be known.

    A network says how it is built by a method ``config()``: options of its constructor, JSON-able. Its class is named
    "module:Class", and found by that name as long as the module is imported. Laws are SDEs of which all options are
    numbers, and the chains that they are discretized to.
    """
    options: Any = getattr(network, "config", None)
    try:
        sde: Any = law.continuous() if isinstance(law, Chain) else law
    except ValueError:
        return None
    levels = law.n if isinstance(law, Chain) else 0
    known = not isinstance(law, Chain) or torch.equal(sde.discretize(law.n).half_log_snr, law.half_log_snr)
    if not callable(options) or not is_dataclass(sde) or not known:
        return None
    numbers = {field.name: getattr(sde, field.name) for field in fields(sde) if field.init}
    found: dict[str, Any] = {"levels": levels}
    for section, entry, values in (("network", network, options()), ("sde", sde, numbers)):
        name = full_name(type(entry))
        found[section] = {"name": name, section_key(name): values}
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return found
