"""Likelihood through the probability-flow ODE."""

from scoresde.likelihood.bits_per_dim import BitsPerDim, bits_per_dim
from scoresde.likelihood.divergence import divergence
from scoresde.likelihood.log_likelihood import Likelihood, log_likelihood

__all__ = ["BitsPerDim", "Likelihood", "bits_per_dim", "divergence", "log_likelihood"]
