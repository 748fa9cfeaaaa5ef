"""The peers' side of the solver benchmarks: diffusers, k-diffusion and azula, in an interpreter of their own.

    PYTHON benchmarks/peers.py accuracy|weak|overhead PROBLEM.npz RESULT.npz

The other scripts start this one; it imports nothing of the project. Every library runs its own code at its defaults,
except for what it needs to solve the same problem:

- Noise levels. States are handed over as y = x / alpha at levels u = sigma / alpha, on which the probability-flow ODE
  of every linear SDE is the same; diffusers and azula get x = y / sqrt(1 + u^2) (variance preserving), k-diffusion y.
  The levels of the grid are written into diffusers' ``scheduler.sigmas`` and the score is asked at exactly these: by
  itself diffusers asks at one of 1000 integer times (`ROUNDED`). azula walks a `Schedule` that is a table of them.
- The end. No level 0 is appended, so that every run stops at the last level; diffusers is told
  ``final_sigmas_type="sigma_min"``. Its lower orders in the last steps stay: with fewer than 15 steps, and always in
  UniPC and SA-Solver.
- Precision. float64 is torch's default here and the levels are float64; DPMSolverMultistepScheduler casts the state to
  float32 all the same.
- k-diffusion's package imports image tools at its top level. Only ``k_diffusion.sampling`` is loaded, with a stand-in
  for the one helper that it takes from ``k_diffusion.utils``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import azula.denoise
import azula.noise
import azula.sample
import diffusers
import measure
import numpy as np
import torch
from torch import Tensor, nn

warnings.filterwarnings("ignore")
diffusers.logging.set_verbosity_error()


def _k_sampling() -> Any:
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = list(spec.submodule_search_locations or ())
    utils.append_dims = lambda x, ndim: x[(..., *[None] * (ndim - x.ndim))]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


K = _k_sampling()
D = diffusers
A = azula.sample


class Mixture:
    """p(x_0) = sum_k w_k N(mu_k, diag(v_k)) and E[x_0 | y = x_0 + u eps]. Counts the rows it is asked for."""

    def __init__(self, means: Tensor, variances: Tensor, log_weights: Tensor) -> None:
        self.means, self.variances, self.log_weights = means, variances, log_weights
        self.rows = 0

    def data(self, y: Tensor, level: Tensor) -> Tensor:
        """Posterior mean at level u, () or (B,)."""
        self.rows += len(y)
        total = self.variances + torch.as_tensor(level).reshape(-1, 1, 1).square()
        offset = y[:, None] - self.means
        whitened = offset / total
        r = torch.softmax(self.log_weights - 0.5 * (offset * whitened + total.log()).sum(-1), 1)[..., None]
        return (r * (self.means + self.variances * whitened)).sum(1)


Data = Callable[[Tensor, Tensor], Tensor]


class Method(NamedTuple):
    """One method of one library: ``run(data, y, levels)``."""

    library: str
    run: Callable[..., Tensor]
    calls: int = 1  # per step
    tree: bool = False  # takes a noise sampler, a Brownian tree by default


# --- diffusers --------------------------------------------------------------------------------------------------------
def _diffusers(make: Callable[[], Any], data: Data, y: Tensor, levels: Tensor, asked: Tensor | None = None) -> Tensor:
    """Multistep schedulers, which hold variance-preserving states. The score may be asked at other levels."""
    scheduler = make()
    n = len(levels) - 1
    scheduler.set_timesteps(n)
    scheduler.sigmas, scheduler.timesteps = levels, torch.arange(n, 0, -1)
    scheduler.set_begin_index(0)
    asked = levels if asked is None else asked
    x = y / (1 + levels[0] ** 2).sqrt()
    for i, t in enumerate(scheduler.timesteps):
        y = x * (1 + asked[i] ** 2).sqrt()
        x = scheduler.step((y - data(y, asked[i])) / asked[i], t, x).prev_sample
    return x * (1 + levels[-1] ** 2).sqrt()


def _rounded(make: Callable[[], Any], data: Data, y: Tensor, levels: Tensor, table: Tensor) -> Tensor:
    """As shipped: the score at the nearest of 1000 integer times, whose levels `table` holds, increasing."""
    times = np.interp(levels.log().numpy(), table.log().numpy(), np.arange(len(table)))
    return _diffusers(make, data, y, levels, table[times.round().astype(int)])


def _diffusers_ve(make: Callable[[], Any], twice: bool, data: Data, y: Tensor, levels: Tensor) -> Tensor:
    """Schedulers that hold unscaled states; Heun's two calls per step are two of its times."""
    scheduler = make()
    scheduler.set_timesteps(len(levels) - 1)
    if twice:
        levels = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
    n = len(levels) - 1
    scheduler.sigmas, scheduler.timesteps = levels, torch.arange(n, 0, -1)
    scheduler.set_begin_index(0)
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(y, t)
        y = scheduler.step((y - data(y, levels[i])) / levels[i], t, y).prev_sample
    return y


def _ddpm(data: Data, y: Tensor, levels: Tensor) -> Tensor:
    n = len(levels) - 1
    scheduler = D.DDPMScheduler(num_train_timesteps=n + 1, clip_sample=False)
    scheduler.alphas_cumprod = 1 / (1 + levels.flip(0) ** 2)
    scale = (1 + levels**2).sqrt()
    x = y / scale[0]
    for i in range(n):
        y = x * scale[i]
        x = scheduler.step((y - data(y, levels[i])) / levels[i], n - i, x).prev_sample
    return x * scale[-1]


def _dpm(**options: Any) -> Method:
    make = partial(D.DPMSolverMultistepScheduler, final_sigmas_type="sigma_min", **options)
    return Method("diffusers", partial(_diffusers, make))


def _unipc(order: int, predict_x0: bool) -> Method:
    make = partial(D.UniPCMultistepScheduler, solver_order=order, predict_x0=predict_x0, final_sigmas_type="sigma_min")
    return Method("diffusers", partial(_diffusers, make))


def _sa(predictor: int, corrector: int, tau: int) -> Method:
    make = partial(D.SASolverScheduler, predictor_order=predictor, corrector_order=corrector, tau_func=lambda t: tau)
    return Method("diffusers", partial(_diffusers, make))


# --- k-diffusion ------------------------------------------------------------------------------------------------------
def _k(name: str, calls: int = 1, tree: bool = False, **options: Any) -> Method:
    sampler = getattr(K, f"sample_{name}")

    def run(data: Data, y: Tensor, levels: Tensor, **more: Any) -> Tensor:
        return sampler(data, y, levels, disable=True, **options, **more)

    return Method("k-diffusion", run, calls, tree)


def _k_fast(data: Data, y: Tensor, levels: Tensor) -> Tensor:
    """Takes the number of calls; its grid is uniform in lambda."""
    return K.sample_dpm_fast(data, y, float(levels[-1]), float(levels[0]), len(levels) - 1, disable=True)


def _k_adaptive(rtol: float, data: Data, y: Tensor, levels: Tensor) -> Tensor:
    ends = float(levels[-1]), float(levels[0])
    return K.sample_dpm_adaptive(data, y, *ends, rtol=rtol, atol=rtol * 0.156, disable=True)


# --- azula ------------------------------------------------------------------------------------------------------------
class Table(azula.noise.Schedule):
    """Time 1 is the first level, 0 the last, equally spaced between."""

    def __init__(self, levels: Tensor) -> None:
        self.n = len(levels) - 1
        self.alphas = (1 + levels**2).rsqrt()
        self.sigmas = levels * self.alphas

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = self.n - (t * self.n).round().long()
        return self.alphas[index], self.sigmas[index]


class ClosedForm(azula.denoise.Denoiser):
    def __init__(self, data: Data, schedule: Table) -> None:
        super().__init__()
        self.data, self.schedule = data, schedule

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
        alpha, sigma = self.schedule(t)
        return azula.denoise.DiracPosterior(mean=self.data(x_t / alpha, sigma / alpha))


def _azula(name: str, calls: int = 1, **options: Any) -> Method:
    def run(data: Data, y: Tensor, levels: Tensor) -> Tensor:
        schedule = Table(levels)
        denoiser = ClosedForm(data, schedule)
        sampler = getattr(A, f"{name}Sampler")(denoiser, steps=schedule.n, silent=True, **options)
        return sampler(y * schedule.alphas[0]) / schedule.alphas[-1]

    return Method("azula", run, calls)


# --- methods ----------------------------------------------------------------------------------------------------------
_lms = partial(_diffusers_ve, D.LMSDiscreteScheduler, False)
_heun = partial(_diffusers_ve, D.HeunDiscreteScheduler, True)
DETERMINISTIC: dict[str, Method] = {
    "diffusers DPM++ 2M": _dpm(),
    "diffusers DPM++ 3M": _dpm(solver_order=3),
    "diffusers DPM-Solver 2M": _dpm(algorithm_type="dpmsolver"),
    "diffusers DEIS-2": Method("diffusers", partial(_diffusers, D.DEISMultistepScheduler)),
    "diffusers DEIS-3": Method("diffusers", partial(_diffusers, partial(D.DEISMultistepScheduler, solver_order=3))),
    "diffusers UniPC-2": _unipc(2, True),
    "diffusers UniPC-3": _unipc(3, True),
    "diffusers UniPC-2 noise": _unipc(2, False),
    "diffusers UniPC-3 noise": _unipc(3, False),
    "diffusers LMS-4": Method("diffusers", _lms),
    "diffusers Heun": Method("diffusers", _heun, 2),
    "k-diffusion euler": _k("euler"),
    "k-diffusion heun": _k("heun", 2),
    "k-diffusion dpm_2": _k("dpm_2", 2),
    "k-diffusion lms": _k("lms"),
    "k-diffusion dpmpp_2m": _k("dpmpp_2m"),
    "k-diffusion dpm_fast": Method("k-diffusion", _k_fast),
    "azula zAB-3": _azula("zAB", order=3),
    "azula zEAB-3": _azula("zEAB", order=3),
    "azula zEAB-4": _azula("zEAB", order=4),
    "azula xEAB-2": _azula("xEAB", order=2),
    "azula xEAB-3": _azula("xEAB", order=3),
    "azula xEAB-4": _azula("xEAB", order=4),
    "azula vAB-2": _azula("vAB", order=2),
    "azula vAB-3": _azula("vAB", order=3),
    "azula vAB-4": _azula("vAB", order=4),
    "azula REAB-3": _azula("REAB", order=3),
}
ROUNDED = {
    "diffusers DPM++ 2M, rounded times": partial(D.DPMSolverMultistepScheduler, final_sigmas_type="sigma_min"),
    "diffusers UniPC-3 noise, rounded times": partial(
        D.UniPCMultistepScheduler, solver_order=3, predict_x0=False, final_sigmas_type="sigma_min"
    ),
}
"""Once more as they are shipped."""
ADAPTIVE = {f"k-diffusion dpm_adaptive, rtol {r:g}": partial(_k_adaptive, r) for r in (5e-2, 5e-3, 5e-4, 5e-5)}
STOCHASTIC: dict[str, Method] = {
    "k-diffusion euler_ancestral": _k("euler_ancestral"),
    "k-diffusion dpm_2_ancestral": _k("dpm_2_ancestral", 2),
    "k-diffusion dpmpp_2s_ancestral": _k("dpmpp_2s_ancestral", 2),
    "k-diffusion dpmpp_sde": _k("dpmpp_sde", 2, tree=True),
    "k-diffusion dpmpp_2m_sde": _k("dpmpp_2m_sde", tree=True),
    "k-diffusion dpmpp_2m_sde heun": _k("dpmpp_2m_sde", tree=True, solver_type="heun"),
    "k-diffusion dpmpp_3m_sde": _k("dpmpp_3m_sde", tree=True),
    "diffusers DDPM": Method("diffusers", _ddpm),
    "diffusers SDE-DPM++ 2M": _dpm(algorithm_type="sde-dpmsolver++"),
    "diffusers SDE-DPM++ 3M": _dpm(algorithm_type="sde-dpmsolver++", solver_order=3),
    "diffusers SA-Solver p2c2": _sa(2, 2, 1),
    "diffusers SA-Solver p3c3": _sa(3, 3, 1),
    "azula DDPM": _azula("DDPM"),
    "azula Ito": _azula("Ito"),
}


# --- jobs -------------------------------------------------------------------------------------------------------------
Arrays = dict[str, Any]


def _tensors(given: Arrays, prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: torch.from_numpy(given[k]) for k in given if k.startswith(prefix)}


def _mixture(part: dict[str, Tensor]) -> Mixture:
    return Mixture(part["means"], part["variances"], part["log_weights"])


def accuracy(given: Arrays) -> Arrays:
    """(median, root mean square, calls) per problem, method, grid and budget."""
    out: Arrays = {}
    options = json.loads(str(given["options"]))
    for problem in options["problems"]:
        part = _tensors(given, f"{problem}/")
        mixture, y, solution = _mixture(part), part["y"], part["solution"]
        runs = {k: (v.run, v.calls) for k, v in DETERMINISTIC.items()}
        if "table" in part:
            runs |= {k: (partial(_rounded, v, table=part["table"]), 1) for k, v in ROUNDED.items()}
        for name, (run, calls) in runs.items():
            own = name.endswith("dpm_fast")
            for grid in options["grids"][:1] if own else options["grids"]:
                for nfe in options["budgets"]:
                    mixture.rows = 0
                    end = run(mixture.data, y, part[f"levels/{grid}/{nfe // calls}"])
                    out[f"{problem}/{name}/{grid}/{nfe}"] = (*measure.errors(end, solution), mixture.rows / len(y))
        for name, run in ADAPTIVE.items():
            mixture.rows = 0
            end = run(mixture.data, y, part[f"levels/{options['grids'][0]}/{options['budgets'][0]}"])
            out[f"{problem}/{name}"] = (*measure.errors(end, solution), mixture.rows / len(y))
    return out


class Path:
    """Impulses of one Brownian path in sigma, which is what a tree in sigma draws from.

    The path's increments over the pieces between all the levels that a run asks for are independent; row k + 2 has a
    unit draw in piece k. The first run collects the levels.
    """

    def __init__(self) -> None:
        self.seen: set[float] = set()
        self.rows = 2

    def freeze(self) -> int:
        self.cuts = sorted(self.seen)
        self.rows = len(self.cuts) + 1
        return self.rows

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        low, high = sorted(round(float(v), 10) for v in (a, b))
        out = torch.zeros(self.rows, 1)
        if self.rows == 2:
            self.seen |= {low, high}
            return out
        for k, (p, q) in enumerate(pairwise(self.cuts)):
            if low <= p and q <= high:
                out[k + 2] = math.sqrt(q - p)
        return out / math.sqrt(high - low)


class Calls:
    """Impulses in the order of calls: row k + 2 has a unit k-th draw. The first run counts."""

    def __init__(self) -> None:
        self.rows, self.count = 2, 0

    def freeze(self) -> int:
        self.rows, self.count = self.count + 2, 0
        return self.rows

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        out = torch.zeros(self.rows, 1)
        if self.rows > 2:
            out[self.count + 2] = 1.0
        self.count += 1
        return out


@contextlib.contextmanager
def _noise_from(source: Callable[..., Tensor]) -> Iterator[None]:
    """Every torch.randn and torch.randn_like answered by `source`: diffusers and azula have no other hook for all."""
    saved = torch.randn, torch.randn_like
    torch.randn = torch.randn_like = source
    try:
        yield
    finally:
        torch.randn, torch.randn_like = saved


def _impulses(method: Method, mixture: Mixture, levels: Tensor) -> tuple[float, float]:
    """Relative error of the variance and error of the mean at the last level, for one Gaussian, exact."""
    source = Path() if method.tree else Calls()

    def run(y: Tensor) -> Tensor:
        if method.tree:
            return method.run(mixture.data, y, levels, noise_sampler=source)
        with _noise_from(source):
            return method.run(mixture.data, y, levels)

    run(torch.zeros(2, 1))
    y = torch.zeros(source.freeze(), 1)
    y[1] = 1.0
    end = run(y)[:, 0]
    mean, variance = float(mixture.means[0, 0]), float(mixture.variances[0, 0])
    a, b, c = end[1] - end[0], end[0], end[2:] - end[0]
    got = a**2 * (variance + levels[0] ** 2) + c.square().sum()
    return float(got / (variance + levels[-1] ** 2) - 1), float(a * mean + b - mean)


def weak(given: Arrays) -> Arrays:
    """Exact weak errors on the Gaussian, and samples of the mixture."""
    out: Arrays = {}
    options = json.loads(str(given["options"]))
    part = _tensors(given, "gaussian/")
    for name, method in STOCHASTIC.items():
        for grid in options["gaussian_grids"]:
            for steps in options["steps"]:
                out[f"gaussian/{name}/{grid}/{steps}"] = _impulses(
                    method, _mixture(part), part[f"levels/{grid}/{steps}"]
                )
    torch.set_default_dtype(torch.float32)  # no error here is as small as float32's
    part = {k: v.float() for k, v in _tensors(given, "mixture/").items()}
    mixture = _mixture(part)
    for name, method in STOCHASTIC.items():
        for grid in options["mixture_grids"]:
            for nfe in options["budgets"]:
                torch.manual_seed(nfe)
                mixture.rows = 0
                end = method.run(mixture.data, part["y"], part[f"levels/{grid}/{nfe // method.calls}"])
                assert mixture.rows <= nfe * len(end), name
                assert end.dtype == torch.float32, name
                out[f"mixture/{name}/{grid}/{nfe}"] = end.numpy()
    return out


def overhead(given: Arrays) -> Arrays:
    """Microseconds per step beyond the network and the making of a grid, and operations per step outside of both."""
    torch.set_default_dtype(torch.float32)
    options = json.loads(str(given["options"]))
    steps, runs = options["steps"], options["runs"]
    network = nn.Conv2d(3, 3, 3, padding=1)
    x = torch.randn(options["shape"])
    levels = torch.from_numpy(given["levels"]).float()

    def call(y: Tensor, level: Tensor) -> Tensor:
        return network(y)

    out: Arrays = {}
    with torch.no_grad():
        bare = measure.microseconds(lambda: [network(x) for _ in range(steps)], steps, runs)
        out["bare"] = (bare, 0.0, 0.0, 0.0)
        for name, loop in _loops(call, x, levels).items():
            torch.manual_seed(0)
            few = 2 if "seeds" in name else max(2, runs // 10) if "tree" in name else runs
            done = 5 if "seeds" in name else steps
            own = np.zeros(4)
            if loop.prepare is not None:
                own[0] = measure.microseconds(loop.prepare, done, few)
                own[1:] = measure.operations(loop.prepare, done, x.numel())
            took = measure.microseconds(loop.run, done, few) - loop.calls * bare
            out[name] = np.array([took, *measure.operations(loop.run, done, x.numel(), loop.calls)]) - own
    return out


class Loop(NamedTuple):
    """A whole run, its network calls per step, and what it does before the first step."""

    run: Callable[[], object]
    calls: int = 1
    prepare: Callable[[], object] | None = None


def _loops(network: Data, x: Tensor, levels: Tensor) -> dict[str, Loop]:
    """Every library's own loop around a network that returns what the library asks of it, with nothing converted."""
    steps = len(levels) - 1

    def scheduled(make: Callable[[], Any], **options: Any) -> Loop:
        def prepare() -> Any:
            scheduler = make()
            scheduler.set_timesteps(steps)
            return scheduler

        def run() -> Tensor:
            scheduler, y = prepare(), x
            for t in scheduler.timesteps:
                y = scheduler.step(network(scheduler.scale_model_input(y, t), t), t, y, **options).prev_sample
            return y

        return Loop(run, prepare=prepare)

    def k(name: str, calls: int = 1) -> Loop:
        return Loop(lambda: getattr(K, f"sample_{name}")(network, x, levels, disable=True), calls)

    def seeded() -> object:
        noise = K.BrownianTreeNoiseSampler(x, levels[-1], levels[0], seed=list(range(len(x))))
        return K.sample_dpmpp_2m_sde(network, x, levels[:6], disable=True, noise_sampler=noise)

    def az(name: str, calls: int = 1, **options: Any) -> Loop:
        class Plain(azula.denoise.Denoiser):
            schedule = azula.noise.VPSchedule()

            def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
                return azula.denoise.DiracPosterior(mean=network(x_t, t))

        return Loop(lambda: getattr(A, f"{name}Sampler")(Plain(), steps=steps, silent=True, **options)(x), calls)

    dpm, unipc = D.DPMSolverMultistepScheduler, D.UniPCMultistepScheduler
    return {
        "diffusers Euler": scheduled(D.EulerDiscreteScheduler),
        "diffusers DDIM": scheduled(D.DDIMScheduler),
        "diffusers DPM++ 2M": scheduled(dpm),
        "diffusers DPM++ 3M": scheduled(partial(dpm, solver_order=3)),
        "diffusers DEIS-3": scheduled(partial(D.DEISMultistepScheduler, solver_order=3)),
        "diffusers LMS-4": scheduled(D.LMSDiscreteScheduler),
        "diffusers UniPC-3": scheduled(partial(unipc, solver_order=3)),
        "diffusers DDIM, eta 1": scheduled(D.DDIMScheduler, eta=1.0),
        "diffusers DDPM": scheduled(D.DDPMScheduler),
        "diffusers SDE-DPM++ 2M": scheduled(partial(dpm, algorithm_type="sde-dpmsolver++")),
        "diffusers SA-Solver p2c2": scheduled(D.SASolverScheduler),
        "k-diffusion euler": k("euler"),
        "k-diffusion heun (2 calls)": k("heun", 2),
        "k-diffusion dpmpp_2m": k("dpmpp_2m"),
        "k-diffusion lms": k("lms"),
        "k-diffusion euler_ancestral": k("euler_ancestral"),
        "k-diffusion dpmpp_2m_sde, tree": k("dpmpp_2m_sde"),
        "k-diffusion dpmpp_sde, tree (2 calls)": k("dpmpp_sde", 2),
        "k-diffusion dpmpp_2m_sde, 64 per-sample seeds": Loop(seeded),
        "azula Euler": az("Euler"),
        "azula DDIM": az("DDIM"),
        "azula Heun (2 calls)": az("Heun", 2),
        "azula xEAB-3": az("xEAB", order=3),
        "azula vAB-3": az("vAB", order=3),
        "azula DDPM": az("DDPM"),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    job, problem, result = sys.argv[1:]
    with np.load(problem) as file:
        given = dict(file)
    versions = {k: importlib.import_module(k).__version__ for k in ("torch", "diffusers", "azula")}
    found = {"accuracy": accuracy, "weak": weak, "overhead": overhead}[job](given)
    np.savez(result, versions=json.dumps(versions), **found)


if __name__ == "__main__":
    main()
