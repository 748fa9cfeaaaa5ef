"""Solvers of fixed steps, which may also predict in a predictor-corrector."""

from collections.abc import Mapping

from sde_lib import Table
from solvers.first_order import DDIM, ERSDE, Ancestral, EulerMaruyama, ReverseDiffusion
from solvers.multistep import DEIS, DPMpp2M, DPMpp3M, LinearMultistep, SASolver, SDEDPMpp2M, SDEDPMpp3M, UniPC
from solvers.runge_kutta import RK4, BogackiShampine, DormandPrince, Heun, Midpoint, Ralston, Tsitouras
from solvers.singlestep import SEEDS2, DPMpp2S, DPMpp3S, DPMppSDE, DPMSolver2, DPMSolver3
from solvers.solver import Solver

PREDICTORS: Mapping[str, type[Solver]] = Table(Solver, {
    "euler_maruyama": EulerMaruyama,
    "reverse_diffusion": ReverseDiffusion,
    "ancestral": Ancestral,
    "ddim": DDIM,
    "er_sde": ERSDE,
    "heun": Heun,
    "midpoint": Midpoint,
    "ralston": Ralston,
    "rk4": RK4,
    "bogacki_shampine": BogackiShampine,
    "dormand_prince": DormandPrince,
    "tsitouras": Tsitouras,
    "dpm_solver_2": DPMSolver2,
    "dpm_solver_3": DPMSolver3,
    "dpmpp_2s": DPMpp2S,
    "dpmpp_3s": DPMpp3S,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_3m": DPMpp3M,
    "deis": DEIS,
    "lms": LinearMultistep,
    "unipc": UniPC,
    "dpmpp_sde": DPMppSDE,
    "seeds_2": SEEDS2,
    "sde_dpmpp_2m": SDEDPMpp2M,
    "sde_dpmpp_3m": SDEDPMpp3M,
    "sa_solver": SASolver,
})
"""Name -> class. A new solver with a step of its own is one file and one line here."""
