"""Numerical solvers of the reverse SDE and of the probability-flow ODE. Needs `sde_lib` only."""

from collections.abc import Mapping

from solvers.adaptive import AdaptiveRungeKutta
from solvers.coordinates import COORDINATES, Angle, Coordinate, HalfLogSNR, NoiseRatio, Time
from solvers.external import SciPyODE, TorchDiffEq, TorchSDE
from solvers.first_order import DDIM, Ancestral, EulerMaruyama, ReverseDiffusion
from solvers.grids import (
    GRIDS,
    Geometric,
    Grid,
    Karras,
    Quadratic,
    UniformAngle,
    UniformHalfLogSNR,
    UniformTime,
    make_knots,
)
from solvers.noise import BrownianPath, Draw, Independent, Noise, PerSample, Recorded, as_draw
from solvers.predictor_corrector import CORRECTORS, AnnealedLangevin, Corrector, Langevin, PredictorCorrector
from solvers.runge_kutta import RK4, TABLEAUX, BogackiShampine, DormandPrince, Heun, Midpoint, RungeKutta, Tableau
from solvers.solve import sample, solve
from solvers.solver import Solution, Solver, SolverError, Status, Step, StepInfo

SOLVERS: Mapping[str, type[Solver]] = {
    "euler_maruyama": EulerMaruyama,
    "reverse_diffusion": ReverseDiffusion,
    "ancestral": Ancestral,
    "ddim": DDIM,
    "predictor_corrector": PredictorCorrector,
    "heun": Heun,
    "midpoint": Midpoint,
    "rk4": RK4,
    "bogacki_shampine": BogackiShampine,
    "dormand_prince": DormandPrince,
    "adaptive": AdaptiveRungeKutta,
    "torchdiffeq": TorchDiffEq,
    "torchsde": TorchSDE,
    "scipy": SciPyODE,
}
"""Name -> class. A new solver is one file and one line here."""

__all__ = [
    "COORDINATES",
    "CORRECTORS",
    "DDIM",
    "GRIDS",
    "RK4",
    "SOLVERS",
    "TABLEAUX",
    "AdaptiveRungeKutta",
    "Ancestral",
    "Angle",
    "AnnealedLangevin",
    "BogackiShampine",
    "BrownianPath",
    "Coordinate",
    "Corrector",
    "DormandPrince",
    "Draw",
    "EulerMaruyama",
    "Geometric",
    "Grid",
    "HalfLogSNR",
    "Heun",
    "Independent",
    "Karras",
    "Langevin",
    "Midpoint",
    "Noise",
    "NoiseRatio",
    "PerSample",
    "PredictorCorrector",
    "Quadratic",
    "Recorded",
    "ReverseDiffusion",
    "RungeKutta",
    "SciPyODE",
    "Solution",
    "Solver",
    "SolverError",
    "Status",
    "Step",
    "StepInfo",
    "Tableau",
    "Time",
    "TorchDiffEq",
    "TorchSDE",
    "UniformAngle",
    "UniformHalfLogSNR",
    "UniformTime",
    "as_draw",
    "make_knots",
    "sample",
    "solve",
]
