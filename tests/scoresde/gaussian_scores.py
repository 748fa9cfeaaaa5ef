"""Stand-ins for score models with known losses: exact scores of one-dimensional Gaussian data, and given answers."""

from __future__ import annotations

import torch
from torch import nn

from sde_lib import SDES, NoisePrediction, Prediction, TabulatedSDE

STD = 0.7  # of the data, one-dimensional and centred
LAWS = {name: cls for name, cls in SDES.items() if cls is not TabulatedSDE}


class Answers(nn.Module):
    """What objectives need of a score model: its law, and a prediction made by a function of (x, knot)."""

    data_spec = None
    dtype = torch.float64

    def __init__(self, law, predict, sigma_data=0.5):
        super().__init__()
        self.law, self.answer, self.sigma_data = law, predict, sigma_data

    def predict(self, x, knot, **condition):
        return self.answer(x, knot, **condition)

    def check_condition(self, condition):
        pass


def exact(law, factor=1.0):
    """The exact noise prediction on the Gaussian data, times a factor."""

    def predict(x, knot):
        best = knot.sigma / (knot.alpha**2 * STD**2 + knot.sigma**2) * x
        return Prediction(x, knot, factor * best, NoisePrediction())

    return Answers(law, predict)


def corners(n):
    """n times four points (x_0, noise) with the exact moments of independent N(0, STD^2) and N(0, 1)."""
    x_0 = STD * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(n)[:, None]
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(n)[:, None]
    return x_0, noise


def least(knot):
    """Smallest possible E|eps_hat - eps|^2: the variance of eps given x."""
    signal = (knot.alpha * STD) ** 2
    return signal / (signal + knot.sigma**2)
