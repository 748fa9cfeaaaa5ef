"""What a network is told beside the state: noise levels and conditions of every kind, in one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.data.conditions import Conditions, ConditionSpec, as_specs
from scoresde.networks.attention import Pool, Tokens
from scoresde.networks.embeddings import FourierEmbedding, SinusoidalEmbedding, zeroed

EMBEDDINGS = ("sinusoidal", "fourier")
CLASS_ENTRIES = ("condition", "features")
WHOLE = (torch.int64, torch.int32)
"""What tables are indexed by."""


class Embedded(NamedTuple):
    """What a network makes of its conditions.

    Attributes:
        vector: (B, width), for every block.
        tokens: for `CrossAttention`; None without conditions of that kind.
        inlet: to be added to the first features; None without images.
    """

    vector: Tensor
    tokens: Tokens | None
    inlet: Tensor | None


class Branches(nn.Module):
    """Modules by any name: a ModuleDict has none that is a method of it, such as "type" or "values"."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules.update(modules)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]


class ConditionEmbedding(nn.Module):
    r"""Noise level, conditions and augmentation parameters, as one vector, tokens, and features to begin with.

    noise level -> features -> linear -> silu -> linear -> silu. By kind, the conditions are

    * class: a row of a table, added to the vector. It has one row more than there are classes, for none;
    * vector: linear -> silu -> linear, added to the vector;
    * tokens: linear (a row of a table for words) -> layer norm, one after the other for all conditions of that kind,
      behind a learned token that is always there, so that no token at all is a value like any other. `CrossAttention`
      of the blocks reads them; `pool_tokens` also adds what one learned query reads to the vector. Tokens are a set:
      what is to know its place must have it in its values;
    * image: a convolution or linear map (`inlet`), added to the first features: that of the image concatenated to the
      channels of the state.

    All but the class table start at zero: the output of a network is at first bitwise the one without them, so that
    trained weights go on with a new condition. A condition that a call leaves out is none, the `null` of its
    specification (Ho & Salimans 2022, arXiv:2207.12598).

    A second noise level, for maps between two times, goes features -> linear -> silu -> linear, added to the vector and
    zero at first; a call that leaves it out means the first one, the diagonal of the map.

    Args:
        width: number of features of the vector and of tokens.
        conditions: name -> `ConditionSpec`, or its arguments.
        embedding: of noise levels, "sinusoidal" or "fourier".
        max_period: see `SinusoidalEmbedding`.
        fourier_scale: see `FourierEmbedding`.
        features: number of features of a noise level's embedding; `width` by default.
        class_entry: "condition": classes are added after the second linear map (Dhariwal & Nichol 2021); "features":
            to the noise level's features (Karras et al. 2022).
        augmentations: number of augmentation parameters, added to the features by a linear map without bias; none given
            counts as zeros: no augmentation (Karras et al. 2022, F.2).
        target_noise_level: whether there is a second noise level.
        pool_tokens: see above.
        inlet: specification of an image -> the module that makes first features of it, without bias.

    Raises:
        TypeError, ValueError: see `as_specs`; for an unknown `embedding` or `class_entry`, or a negative number of
            augmentations.
    """

    def __init__(
        self,
        width: int,
        conditions: Conditions | None,
        embedding: str = "sinusoidal",
        max_period: float = 10000.0,
        fourier_scale: float = 16.0,
        features: int | None = None,
        class_entry: str = "condition",
        augmentations: int = 0,
        target_noise_level: bool = False,
        pool_tokens: bool = False,
        *,
        inlet: Callable[[ConditionSpec], nn.Module],
    ) -> None:
        super().__init__()
        if augmentations < 0:
            raise ValueError(f"`augmentations` must be >= 0, got {augmentations}.")
        if class_entry not in CLASS_ENTRIES:
            raise ValueError(f"`class_entry` must be one of {', '.join(CLASS_ENTRIES)}, got {class_entry!r}.")
        features = width if features is None else features
        if embedding == "sinusoidal":
            self.noise_level: nn.Module = SinusoidalEmbedding(features, max_period)
        elif embedding == "fourier":
            self.noise_level = FourierEmbedding(features, fourier_scale)
        else:
            raise ValueError(f"`embedding` must be one of {', '.join(EMBEDDINGS)}, got {embedding!r}.")
        self.specs, self.class_entry, self.augmentations = as_specs(conditions), class_entry, augmentations
        self.first, self.second = nn.Linear(features, width), nn.Linear(width, width)
        entry = width if class_entry == "condition" else features

        def branch(spec: ConditionSpec) -> nn.Module:
            if spec.kind == "class":
                return nn.Embedding(spec.classes + 1, entry)
            if spec.kind == "vector":
                return _two_maps(spec.shape[0], width)
            if spec.kind == "tokens":
                words = nn.Embedding(spec.classes, width) if spec.classes else nn.Linear(spec.shape[1], width)
                return nn.Sequential(words, nn.LayerNorm(width))
            return zeroed(inlet(spec))

        self.branches = Branches({name: branch(spec) for name, spec in self.specs.items()})
        self.augment = nn.Linear(augmentations, features, bias=False) if augmentations else None
        self.target = _two_maps(features, width) if target_noise_level else None
        has_tokens = bool(self.names("tokens"))
        self.no_token = nn.Parameter(torch.randn(1, width)) if has_tokens else None
        self.pool = Pool(width) if has_tokens and pool_tokens else None

    def names(self, kind: str) -> list[str]:
        """Of the conditions of a kind."""
        return [name for name, spec in self.specs.items() if spec.kind == kind]

    def forward(
        self,
        noise_level: Tensor,
        target_noise_level: Tensor | None = None,
        augment_label: Tensor | None = None,
        condition: Mapping[str, Any] | None = None,
    ) -> Embedded:
        """Noise level (B,), target (B,), augmentation parameters (B, augmentations), conditions -> `Embedded`.

        Raises:
            TypeError: for a condition, target or augmentation given to a network without, or a value of another type.
            ValueError: for one of another shape.
        """
        given = self._complete(condition or {}, noise_level)
        h = self.noise_level(noise_level).to(self.dtype)
        if augment_label is not None:
            h = h + self._augmented(augment_label, noise_level.shape[0])
        if self.class_entry == "features":
            h = self._added(h, "class", given)
        h = self.second(F.silu(self.first(h)))
        if self.class_entry == "condition":
            h = self._added(h, "class", given)
        h = self._added(h, "vector", given)
        if self.target is not None:
            target = noise_level if target_noise_level is None else target_noise_level
            _check_shape("target_noise_level", target, tuple(noise_level.shape))
            h = h + self.target(self.noise_level(target).to(self.dtype))
        elif target_noise_level is not None:
            raise TypeError("This network has one noise level: build it with target_noise_level=True for two.")
        tokens = self._tokens(given)
        if self.pool is not None:
            h = h + self.pool(tokens)
        # the final activation is shared by every block, so each block needs one linear map only
        return Embedded(F.silu(h), tokens, self._added(None, "image", given))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.first.weight.dtype

    def _complete(self, condition: Mapping[str, Any], noise_level: Tensor) -> dict[str, Any]:
        """Every condition, those left out, and None, as none."""
        for name, value in condition.items():
            if name not in self.specs and value is not None:
                known = f"it has {', '.join(self.specs)}" if self.specs else "it was built without conditions"
                raise TypeError(f"This network has no condition `{name}`: {known}.")
        n = noise_level.shape[0]
        given = {}
        for name, spec in self.specs.items():
            value = condition.get(name)
            if value is None:
                value = spec.null(n, noise_level.device)
            elif spec.kind == "tokens":
                if not isinstance(value, Mapping) or set(value) != {"tokens", "mask"}:
                    raise TypeError(f'`{name}` must be a mapping {{"tokens": …, "mask": …}}.')
                _check_shape(f"{name}.tokens", value["tokens"], (n, *spec.shape), WHOLE if spec.classes else ())
                _check_shape(f"{name}.mask", value["mask"], (n, spec.shape[0]), (torch.bool,))
            else:
                _check_shape(name, value, (n, *spec.shape), WHOLE if spec.classes else ())
            given[name] = value
        return given

    def _augmented(self, augment_label: Tensor, n: int) -> Tensor:
        if self.augment is None:
            raise TypeError("This network was built without augmentations: call it without `augment_label`.")
        _check_shape("augment_label", augment_label, (n, self.augmentations))
        added: Tensor = self.augment(augment_label.to(self.dtype))
        return added

    def _added(self, h: Any, kind: str, given: Mapping[str, Any]) -> Any:
        """h and the branches of a kind; nothing is None."""
        for name in self.names(kind):
            value = given[name]
            part = self.branches[name](value if kind == "class" else value.to(self.dtype))
            h = part if h is None else h + part
        return h

    def _tokens(self, given: Mapping[str, Any]) -> Any:
        if self.no_token is None:
            return None
        values, masks = [], []
        for name in self.names("tokens"):
            token, mask = given[name]["tokens"], given[name]["mask"]
            if self.specs[name].classes:
                token = token.masked_fill(~mask, 0)
            else:
                # not even an infinite or undefined value may come through where the mask is False
                token = token.to(self.dtype).masked_fill(~mask[..., None], 0.0)
            values.append(self.branches[name](token))
            masks.append(mask)
        always = torch.ones_like(masks[0][:, :1])
        no_token = self.no_token.expand(always.shape[0], 1, -1)
        return Tokens(torch.cat([no_token, *values], 1), torch.cat([always, *masks], 1))


def _two_maps(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), zeroed(nn.Linear(width, width)))


def _check_shape(name: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"`{name}` must be a tensor of {str(dtypes[0]).removeprefix('torch.')}, got {value.dtype}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(value.shape)}.")


def check_images(specs: Mapping[str, ConditionSpec], shape: tuple[int, ...]) -> None:
    """Raise unless every image among the conditions has the sides of the data, (C, H, W)."""
    for name, spec in specs.items():
        if spec.kind == "image" and spec.shape[1:] != tuple(shape[1:]):
            raise ValueError(
                f"Condition `{name}` is of {' x '.join(map(str, spec.shape[1:]))} pixels, the data are of "
                f"{' x '.join(map(str, shape[1:]))}: it joins their channels, so resize it to them first."
            )
