"""Forward SDEs, their reverse, their discretizations, and closed-form test distributions. Needs torch only."""

from collections.abc import Mapping

from sde_lib._checks import Table, build, lookup
from sde_lib.chain import Chain
from sde_lib.cosine import CosineVPSDE
from sde_lib.edm import EDMSDE
from sde_lib.flow import FlowSDE
from sde_lib.gaussian_mixture import GaussianMixture
from sde_lib.knot import DATA, Kernel, Knot, Law, Posterior, noise_fraction, posterior, state_std, transition
from sde_lib.noise_levels import NOISE_LEVELS
from sde_lib.prediction import (
    PARAMETERIZATIONS,
    DataPrediction,
    EDMPrediction,
    FlowPrediction,
    NoisePrediction,
    Parameterization,
    Prediction,
    ScorePrediction,
    UnitVPrediction,
    Velocity,
    VPrediction,
)
from sde_lib.reverse import DESCRIBES, Reverse, ReverseSDE, Wrapper
from sde_lib.sde import SDE
from sde_lib.sub_vp import SubVPSDE
from sde_lib.tabulated import TabulatedSDE
from sde_lib.ve import VESDE
from sde_lib.vp import VPSDE

SDES: Mapping[str, type[SDE]] = Table(SDE, {
    "vp": VPSDE,
    "sub_vp": SubVPSDE,
    "ve": VESDE,
    "cosine": CosineVPSDE,
    "edm": EDMSDE,
    "flow": FlowSDE,
    "tabulated": TabulatedSDE,
})
"""Name -> class. A new SDE is one file and one line here. "module:Class" names one of your own."""

__all__ = [
    "DATA",
    "DESCRIBES",
    "EDMSDE",
    "NOISE_LEVELS",
    "PARAMETERIZATIONS",
    "SDE",
    "SDES",
    "VESDE",
    "VPSDE",
    "Chain",
    "CosineVPSDE",
    "DataPrediction",
    "EDMPrediction",
    "FlowPrediction",
    "FlowSDE",
    "GaussianMixture",
    "Kernel",
    "Knot",
    "Law",
    "NoisePrediction",
    "Parameterization",
    "Posterior",
    "Prediction",
    "Reverse",
    "ReverseSDE",
    "ScorePrediction",
    "SubVPSDE",
    "Table",
    "TabulatedSDE",
    "UnitVPrediction",
    "VPrediction",
    "Velocity",
    "Wrapper",
    "build",
    "lookup",
    "noise_fraction",
    "posterior",
    "state_std",
    "transition",
]
