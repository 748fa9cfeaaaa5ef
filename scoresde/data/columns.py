"""Conditions that stand beside the data in a file of arrays: which they are, in a few words, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.data.conditions import KINDS, ConditionSpec
from sde_lib._checks import did_you_mean


@dataclass(frozen=True)
class Column:
    """One condition of a file.

    Attributes:
        name: of the condition.
        kind: one of `scoresde.data.conditions.KINDS`.
        classes: of a class, or words of the tokens' vocabulary; 0: as many as the file has.
        key: name of the array; tokens may also stand under `key`.tokens, and their mask stands under `key`.mask.
    """

    name: str
    kind: str
    classes: int
    key: str

    def keys(self, names: Sequence[str]) -> list[str]:
        """Which arrays of a file it is read from: that of the values, and the mask if there is one.

        Raises:
            ValueError: if there is none.
        """
        tokens = self.kind == "tokens"
        key = f"{self.key}.tokens" if tokens and self.key not in names else self.key
        if key not in names:
            raise ValueError(f"no array {self.key!r} in the file; it holds {', '.join(names) or 'nothing'}")
        return [key, *(name for name in names if tokens and name == f"{self.key}.mask")]

    def value(self, arrays: Sequence[np.ndarray], n: int) -> tuple[Any, ConditionSpec]:
        """The condition of all n samples, and its specification, from the arrays of `keys`.

        Raises:
            ValueError: for arrays of another shape or type, not finite or out of range.
        """
        array = arrays[0]
        if self.kind == "class":
            labels, classes = self._whole(array, (n,), None)
            return labels, ConditionSpec("class", classes=classes)
        if self.kind == "tokens":
            return self._tokens(array, arrays[1] if len(arrays) > 1 else None, n)
        dims = {"vector": 1, "image": 3}[self.kind]
        return self._real(array, n, dims, None), ConditionSpec(self.kind, tuple(array.shape[1:]))

    def _tokens(self, array: np.ndarray, mask: np.ndarray | None, n: int) -> tuple[Any, ConditionSpec]:
        """Tokens that are vectors (N, L, d) or words (N, L), and their mask; behind the mask stand zeros."""
        if mask is None:
            mask = np.ones(array.shape[:2], dtype=bool)
        if mask.dtype != np.bool_ or mask.shape != array.shape[:2]:
            raise ValueError(
                f"the mask of condition {self.name!r} must be bool of shape {array.shape[:2]}, got {mask.dtype} of "
                f"shape {mask.shape}"
            )
        if array.dtype.kind in "iu":
            tokens, classes = self._whole(array, (n, *array.shape[1:2]), mask)
            spec = ConditionSpec("tokens", tuple(tokens.shape[1:]), classes=classes)
        else:
            tokens = self._real(array, n, 2, mask)
            spec = ConditionSpec("tokens", tuple(tokens.shape[1:]))
        return {"tokens": tokens, "mask": torch.from_numpy(mask.copy())}, spec

    def _whole(self, array: np.ndarray, shape: tuple[int, ...], mask: np.ndarray | None) -> tuple[Tensor, int]:
        """Whole numbers from 0, and how many there are."""
        if array.dtype.kind not in "iu" or array.shape != shape:
            raise ValueError(
                f"condition {self.name!r} must be integers of shape {shape}, got {array.dtype} of shape {array.shape}"
            )
        value = array.astype(np.int64)
        if mask is not None:
            value = np.where(mask, value, 0)
        low, high = (int(value.min()), int(value.max())) if value.size else (0, 0)
        classes = self.classes or high + 1
        if low < 0 or high >= classes:
            raise ValueError(f"condition {self.name!r} must be >= 0 and < {classes}, got values from {low} to {high}")
        return torch.from_numpy(value), classes

    def _real(self, array: np.ndarray, n: int, dims: int, mask: np.ndarray | None) -> Tensor:
        """Real numbers."""
        if array.dtype.kind != "f" or array.ndim != dims + 1 or len(array) != n or 0 in array.shape:
            wanted = {1: "(N, d)", 2: "(N, L, d), or integers (N, L)", 3: "(N, C, H, W)"}[dims]
            raise ValueError(
                f"condition {self.name!r} must be real numbers of shape {wanted} with N = {n}, of mean 0 and standard "
                f"deviation 1 or so, got {array.dtype} of shape {array.shape}"
            )
        value = array if mask is None else np.where(mask[..., None], array, 0.0)
        bad = int((~np.isfinite(value)).reshape(n, -1).any(1).sum())
        if bad:
            raise ValueError(f"condition {self.name!r} holds NaN or infinite values in {bad} of {n} samples")
        return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))


def columns(text: str, labels_key: str = "") -> list[Column]:
    """Conditions that a text names, ``"pose:vector, text:tokens, style:class:12"``, and the classes of `labels_key`.

    Raises:
        TypeError: for what is no text.
        ValueError: for a name or kind that is none, a number that is none or that the kind has not, or a name twice.
    """
    if not isinstance(text, str):
        raise TypeError(f'`conditions` must be a text such as "pose:vector, text:tokens", got {text!r}.')
    found = [Column("class_label", "class", 0, labels_key)] if labels_key else []
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, kind, number, *more = (*(part.strip() for part in word.split(":")), "", "")[:4]
        if any(more) or word.count(":") > 2 or not name.isidentifier():
            raise ValueError(
                f"`conditions` must be name:kind or name:kind:classes, separated by commas, e.g. "
                f'"pose:vector, text:tokens, style:class:12", got {word!r}.'
            )
        if kind not in KINDS:
            raise ValueError(
                f"Condition {name!r} in `conditions` must be of a kind among {', '.join(KINDS)}, got {kind!r}."
                f"{did_you_mean(kind, KINDS)}"
            )
        if number and (kind not in ("class", "tokens") or not number.isdecimal() or int(number) < 1):
            raise ValueError(
                f"`conditions`: a number, of classes or of words of a vocabulary, is for kinds class and tokens, and "
                f"positive; got {word!r}."
            )
        if name in (column.name for column in found):
            raise ValueError(f"`conditions` and `labels_key` name {name!r} twice.")
        found.append(Column(name, kind, int(number or 0), name))
    return found
