"""Likelihood through the probability-flow ODE, with an error bar, and its bounds."""

from scoresde.likelihood.bits import BitsPerDim
from scoresde.likelihood.bits_per_dim import bits_per_dim
from scoresde.likelihood.bound import Bound
from scoresde.likelihood.divergence import Divergence, divergence
from scoresde.likelihood.elbo import elbo
from scoresde.likelihood.elbo_of_data import DataBound, elbo_of_data
from scoresde.likelihood.log_likelihood import log_likelihood
from scoresde.likelihood.probes import (
    PROBES,
    BasisProbes,
    CosineProbes,
    DilutedProbes,
    GaussianProbes,
    HaarProbes,
    Probes,
    RademacherProbes,
)
from scoresde.likelihood.result import Likelihood

__all__ = [
    "PROBES",
    "BasisProbes",
    "BitsPerDim",
    "Bound",
    "CosineProbes",
    "DataBound",
    "DilutedProbes",
    "Divergence",
    "GaussianProbes",
    "HaarProbes",
    "Likelihood",
    "Probes",
    "RademacherProbes",
    "bits_per_dim",
    "divergence",
    "elbo",
    "elbo_of_data",
    "log_likelihood",
]
