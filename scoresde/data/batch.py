"""What an objective is given at a step: some samples and their conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of a data set.

    Attributes:
        data: (B, *D) in data units: integers where there are levels.
        condition: conditions by name, the batch first at every depth.
    """

    data: Tensor
    condition: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.data.shape[0]
