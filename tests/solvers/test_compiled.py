"""Fixed-step runs as one graph: torch.compile takes them whole, and a CUDA graph captures them.

`fullgraph=True` makes PyTorch itself refuse any graph break; `torch.cuda.set_sync_debug_mode` makes it refuse any wait.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde import MLP, ScoreModel
from sde_lib import SDES, VPSDE, FlowSDE
from solvers import DDIM, SOLVERS, DPMpp3M, Heun, Multistep, PredictorCorrector, Recorded, UniPC, solve

FIXED = {name: cls() for name, cls in SOLVERS.items() if not cls.adaptive}
FIXED |= {
    "ddim, eta": DDIM(eta=1.0),
    "heun, churn": Heun(s_churn=10.0),
    "v in the angle": Multistep(3, 4, "v", "angle"),
    "unipc as a predictor": PredictorCorrector(UniPC(), "langevin"),
}
# one of each kind in the quick suite: first order with noise, stages, histories, correctors; compiling takes seconds
QUICK = ("ddim, eta", "dpm_solver_2", "dpmpp_3m", "sa_solver", "predictor_corrector")
KINDS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FIXED]


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()


def problem(device: torch.device, sde=None):
    net = torch.nn.Conv2d(2, 2, 3, padding=1).double().to(device)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    draws = torch.randn(40, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    rev = (sde or VPSDE()).reverse(v=lambda x, t: torch.tanh(net(x)) * t.reshape(-1, 1, 1, 1))
    return rev, x, draws


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_one_graph(name, device):
    """The whole call, from the grid to the result, compiles without a break and computes what it did."""
    rev, x, _draws = problem(device)
    noise = [4, 5, 6] if FIXED[name].stochastic else None  # a seed per sample: plain tensor arithmetic

    def run(x: Tensor) -> Tensor:
        return solve(rev, x, FIXED[name], steps=4, grid="uniform_half_log_snr", rng=noise, check=False).x

    with torch.no_grad():
        expected = run(x)
        compiled = torch.compile(run, fullgraph=True, backend="eager")(x)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)


def test_a_break_would_be_refused(device):
    """The check above can fail: with its look at the result the same call does not compile whole."""
    rev, x, _draws = problem(device)

    def run(x: Tensor) -> Tensor:
        return solve(rev, x, DDIM(), steps=2, grid="uniform_half_log_snr").x

    with pytest.raises(Exception, match=r"(?i)data-dependent|graph break|unsupported"):
        torch.compile(run, fullgraph=True, backend="eager")(x)


def test_without_check_a_bad_run_is_not_noticed():
    """Documented: status cannot know; with the check it does."""
    rev = VPSDE().reverse(score=lambda x, t: x * float("nan"))
    x = torch.ones(2, 3)
    blind = solve(rev, x, DDIM(), steps=2, check=False)
    assert blind.ok and blind.x.isnan().all()
    with pytest.warns(RuntimeWarning, match="step 1 of 2"):
        assert not solve(rev, x, DDIM(), steps=2).ok
    with pytest.raises(ValueError, match="check"):
        solve(rev, x, DDIM(), steps=2, check=False, strict=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rng", ["recorded", "a seed per sample"])
@pytest.mark.parametrize("name", ["ddim, eta", "heun", "dpmpp_3m", "unipc", "sa_solver", "dpm_solver_3"])
def test_a_run_is_a_cuda_graph(name, rng):
    """Captured once, replayed on new states: bitwise the eager run. A wait for the device would end the capture."""
    device = torch.device("cuda")
    rev, x, draws = problem(device)
    noise = Recorded(draws) if rng == "recorded" else [1, 2, 3]

    def run(x: Tensor) -> Tensor:
        return solve(rev, x, FIXED[name], steps=4, grid="uniform_half_log_snr", rng=noise, check=False).x

    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            run(x)
    torch.cuda.current_stream().wait_stream(side)
    still, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run(still)
    for scale in (1.0, 0.5):
        still.copy_(scale * x)
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(out, run(scale * x), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FIXED)
def test_a_run_never_waits_for_the_gpu(name):
    """PyTorch raises at the first synchronisation."""
    rev, x, draws = problem(torch.device("cuda"))
    solve(rev, x, FIXED[name], steps=4, grid="uniform_half_log_snr", rng=Recorded(draws), check=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve(rev, x, FIXED[name], steps=4, grid="uniform_half_log_snr", rng=Recorded(draws), check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_flow_starts_from_pure_noise_in_one_graph(device):
    """alpha = 0 at t = 1: the first, infinitely long step in lambda, compiled."""
    rev, x, draws = problem(device, FlowSDE())

    def run(x: Tensor) -> Tensor:
        noise = Recorded(draws)
        return solve(rev, x, DPMpp3M(starter="ramp"), steps=4, end="denoise", rng=noise, check=False).x

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, run(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "kind"), [("vp", "model"), ("flow", "model"), ("vp", "reverse")])
def test_a_model_takes_any_number_as_its_time_in_two_graphs(name, kind):
    """One for the first time, one for all others: a graph each would end at PyTorch's limit, or in a failed guard."""
    law = SDES[name]()
    model: Any = ScoreModel(MLP((2,)), law, "v").eval()
    model = model if kind == "model" else model.reverse()
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x, t: model(x, t), fullgraph=True, backend="eager")
    with torch.no_grad():
        for t in (0.5, 0.25, 0.75, 0.125, 0.9, 0.2):
            # coefficients in float64 on either side, rounded once to the state's float32
            torch.testing.assert_close(compiled(x, t).score, model(x, t).score, rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
