"""Elementary functions that take a Python float or a tensor, so that one formula serves both.

A fixed grid is made of floats (float64, on the host, nothing for the device to wait for); where every sample has
its own time the same formulas run on float64 tensors. Floats follow IEEE conventions here (``log(0) = -inf``,
``exp`` overflows to ``inf``) where the standard library would raise.
"""

import math

import torch
from torch import Tensor

Real = float | Tensor


def exp(a: Real) -> Real:
    if isinstance(a, Tensor):
        return torch.exp(a)
    return math.inf if a > 709.0 else math.exp(a)


def expm1(a: Real) -> Real:
    if isinstance(a, Tensor):
        return torch.expm1(a)
    return math.inf if a > 709.0 else math.expm1(a)


def log(a: Real) -> Real:
    if isinstance(a, Tensor):
        return torch.log(a)
    return -math.inf if a == 0.0 else math.log(a)


def log1p(a: Real) -> Real:
    return torch.log1p(a) if isinstance(a, Tensor) else math.log1p(a)


def sqrt(a: Real) -> Real:
    return torch.sqrt(a) if isinstance(a, Tensor) else math.sqrt(a)


def sin(a: Real) -> Real:
    return torch.sin(a) if isinstance(a, Tensor) else math.sin(a)


def cos(a: Real) -> Real:
    return torch.cos(a) if isinstance(a, Tensor) else math.cos(a)


def tan(a: Real) -> Real:
    return torch.tan(a) if isinstance(a, Tensor) else math.tan(a)


def asinh(a: Real) -> Real:
    return torch.asinh(a) if isinstance(a, Tensor) else math.asinh(a)


def atan2(a: Real, b: Real) -> Real:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.atan2(a, b)
    return math.atan2(float(a), float(b))


def softplus(a: Real) -> Real:
    """log(1 + e^a) without overflow, and without torch's switch to the identity at a = 20."""
    if isinstance(a, Tensor):
        return torch.clamp(a, min=0.0) + torch.log1p(torch.exp(-a.abs()))
    return max(a, 0.0) + math.log1p(math.exp(-abs(a)))


def sigmoid(a: Real) -> Real:
    return torch.sigmoid(a) if isinstance(a, Tensor) else float(exp(-softplus(-a)))


def full_like(a: Real, value: float) -> Real:
    """`value` in the form of `a`: a constant coefficient that still has the shape of its time."""
    return torch.full_like(a, value) if isinstance(a, Tensor) else value
