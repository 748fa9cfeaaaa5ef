"""All solvers by name."""

from collections.abc import Mapping

from sde_lib import Table
from solvers.adaptive import AdaptiveDPMSolver, AdaptiveRungeKutta
from solvers.external import SciPyODE, TorchDiffEq, TorchSDE
from solvers.gotta_go_fast import GottaGoFast
from solvers.predictor_corrector import PredictorCorrector
from solvers.predictors import PREDICTORS
from solvers.recommend import Recommended
from solvers.solver import Solver

SOLVERS: Mapping[str, type[Solver]] = Table(Solver, {
    **PREDICTORS,
    "predictor_corrector": PredictorCorrector,
    "recommended": Recommended,
    "adaptive": AdaptiveRungeKutta,
    "adaptive_dpm_solver": AdaptiveDPMSolver,
    "gotta_go_fast": GottaGoFast,
    "torchdiffeq": TorchDiffEq,
    "torchsde": TorchSDE,
    "scipy": SciPyODE,
})
"""Name -> class. A new solver is one file and one line, here or in `PREDICTORS`; "module:Class" is your own."""
