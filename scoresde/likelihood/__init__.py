"""Likelihood through the probability-flow ODE, with an error bar, and its bounds."""

from scoresde.likelihood.bits_per_dim import BitsPerDim, bits_per_dim
from scoresde.likelihood.divergence import Divergence, divergence
from scoresde.likelihood.elbo import Bound, DataBound, elbo, elbo_of_data
from scoresde.likelihood.log_likelihood import Likelihood, log_likelihood
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
