"""Score-based generative models in continuous time.

The facade: SDEs from `sde_lib`, solvers from `solvers`, and score models, losses and likelihoods from this package.
Importing it stays light: `train`, `load_model` and `save_model` bring their libraries when they are first asked for;
data, configurations and the demo are imported from their modules.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from scoresde.guidance import ClassifierFreeGuidance, ClipData, inpaint
from scoresde.likelihood import BitsPerDim, Likelihood, bits_per_dim, divergence, log_likelihood
from scoresde.losses import chain_loss, continuous_loss
from scoresde.metrics import energy_distance, gaussian_bits_per_dim, sliced_wasserstein
from scoresde.networks import MLP, NETWORKS, UNet
from scoresde.score_model import LABELS, DataSpec, ScoreModel
from sde_lib import (
    EDMSDE,
    PARAMETERIZATIONS,
    SDE,
    SDES,
    VESDE,
    VPSDE,
    Chain,
    CosineVPSDE,
    FlowSDE,
    GaussianMixture,
    Knot,
    Prediction,
    ReverseSDE,
    SubVPSDE,
    TabulatedSDE,
)
from solvers import (
    CORRECTORS,
    DDIM,
    GRIDS,
    RK4,
    SOLVERS,
    AdaptiveRungeKutta,
    Ancestral,
    AnnealedLangevin,
    BogackiShampine,
    BrownianPath,
    DormandPrince,
    EulerMaruyama,
    Geometric,
    Heun,
    Karras,
    Langevin,
    Midpoint,
    PredictorCorrector,
    Quadratic,
    ReverseDiffusion,
    RungeKutta,
    SciPyODE,
    Solution,
    SolverError,
    TorchDiffEq,
    TorchSDE,
    UniformAngle,
    UniformHalfLogSNR,
    UniformTime,
    sample,
    solve,
)

_LAZY = {
    "load_model": "scoresde.training.checkpoint",
    "save_model": "scoresde.training.checkpoint",
    "train": "scoresde.training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'scoresde' has no attribute {name!r}")


try:
    __version__ = version("scoresde")
except PackageNotFoundError:  # a bare checkout
    __version__ = "0+unknown"

__all__ = [
    "CORRECTORS",
    "DDIM",
    "EDMSDE",
    "GRIDS",
    "LABELS",
    "MLP",
    "NETWORKS",
    "PARAMETERIZATIONS",
    "RK4",
    "SDE",
    "SDES",
    "SOLVERS",
    "VESDE",
    "VPSDE",
    "AdaptiveRungeKutta",
    "Ancestral",
    "AnnealedLangevin",
    "BitsPerDim",
    "BogackiShampine",
    "BrownianPath",
    "Chain",
    "ClassifierFreeGuidance",
    "ClipData",
    "CosineVPSDE",
    "DataSpec",
    "DormandPrince",
    "EulerMaruyama",
    "FlowSDE",
    "GaussianMixture",
    "Geometric",
    "Heun",
    "Karras",
    "Knot",
    "Langevin",
    "Likelihood",
    "Midpoint",
    "Prediction",
    "PredictorCorrector",
    "Quadratic",
    "ReverseDiffusion",
    "ReverseSDE",
    "RungeKutta",
    "SciPyODE",
    "ScoreModel",
    "Solution",
    "SolverError",
    "SubVPSDE",
    "TabulatedSDE",
    "TorchDiffEq",
    "TorchSDE",
    "UNet",
    "UniformAngle",
    "UniformHalfLogSNR",
    "UniformTime",
    "bits_per_dim",
    "chain_loss",
    "continuous_loss",
    "divergence",
    "energy_distance",
    "gaussian_bits_per_dim",
    "inpaint",
    "load_model",
    "log_likelihood",
    "sample",
    "save_model",
    "sliced_wasserstein",
    "solve",
    "train",
]
