"""The embedded data: scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scoresde.data.conditions import classes
from scoresde.data.dataset import Dataset, Source, Split, check_held_out, split
from scoresde.data.spec import DataSpec


@dataclass(frozen=True)
class Digits(Source):
    """1797 handwritten digits of 8 x 8 pixels with the 17 grey levels 0 … 16, in ten classes.

    They come inside scikit-learn: real images without a download.

    Source: E. Alpaydin & C. Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository (its test set).

    Args:
        held_out: fraction kept from training, in (0, 1).
        seed: of the split. The order of the samples in training has its own seed.
        labels: whether the digit is given to the network as a class.

    Raises:
        ValueError: for a fraction outside (0, 1).
        ImportError: at `load` without scikit-learn.
    """

    held_out: float = 0.2
    seed: int = 0
    labels: bool = True

    def __post_init__(self) -> None:
        check_held_out(self.held_out)

    def load(self) -> Dataset:
        """Read and split; data are uint8 of shape (N, 1, 8, 8)."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("The digits come with scikit-learn: pip install 'scoresde[train]'") from error
        images, digits = load_digits(return_X_y=True)
        data = torch.from_numpy(images).to(torch.uint8).reshape(-1, 1, 8, 8)
        condition = {"class_label": torch.from_numpy(digits).long()} if self.labels else {}
        train, held_out = split(Split(data, condition), self.held_out, self.seed)
        spec = DataSpec((1, 8, 8), levels=17, conditions=classes(10 if self.labels else 0))
        return Dataset("digits", train, held_out, spec)
