"""Data by name. Every source has an explicit training and held-out split: ``DATASETS["digits"]().load()``."""

from collections.abc import Mapping

from scoresde.data.arrays import Arrays
from scoresde.data.batch import Batch
from scoresde.data.conditions import ConditionSpec, classes
from scoresde.data.dataset import Dataset, Source, Split
from scoresde.data.digits import Digits
from scoresde.data.spec import DataSpec
from scoresde.data.toys import Checkerboard, Moons, Ring, Spiral, Toy
from sde_lib import Table

DATASETS: Mapping[str, type[Source]] = Table(Source, {
    "digits": Digits,
    "arrays": Arrays,
    "ring": Ring,
    "moons": Moons,
    "spiral": Spiral,
    "checkerboard": Checkerboard,
})
"""Name -> class with ``load() -> Dataset``. A new source is one file and one line here; "module:Class" is your own."""

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
    "Source",
    "Spiral",
    "Split",
    "Toy",
    "classes",
]
