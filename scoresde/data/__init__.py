"""Data by name. Every source has an explicit training and held-out split: ``DATASETS["digits"]().load()``."""

from collections.abc import Mapping
from typing import Any

from scoresde.data.arrays import Arrays
from scoresde.data.batch import Batch
from scoresde.data.conditions import ConditionSpec, classes
from scoresde.data.dataset import Dataset, Split
from scoresde.data.digits import Digits
from scoresde.data.spec import DataSpec
from scoresde.data.toys import Checkerboard, Moons, Ring, Spiral, Toy

DATASETS: Mapping[str, type[Any]] = {
    "digits": Digits,
    "arrays": Arrays,
    "ring": Ring,
    "moons": Moons,
    "spiral": Spiral,
    "checkerboard": Checkerboard,
}
"""Name -> class with ``load() -> Dataset``. A new source is one file and one line here."""

__all__ = [
    "DATASETS",
    "Arrays",
    "Batch",
    "Checkerboard",
    "ConditionSpec",
    "DataSpec",
    "Dataset",
    "Digits",
    "Moons",
    "Ring",
    "Spiral",
    "Split",
    "Toy",
    "classes",
]
