"""What solvers see: conditions, rows, wrappers and the ways in which a user's function becomes a reverse SDE."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from scoresde.guidance import ClassifierFreeGuidance
from sde_lib import (
    EDMSDE,
    SDES,
    VESDE,
    VPSDE,
    Chain,
    GaussianMixture,
    ReverseSDE,
    TabulatedSDE,
    Wrapper,
    posterior,
    transition,
)
from solvers import AdaptiveRungeKutta, Ancestral, Heun, TorchDiffEq, solve

CHAIN = VPSDE().discretize(30)


def network(x, t, y=None, extra=None):
    shift = 0.0 if y is None else y[:, None]
    return x * torch.tanh(t)[:, None] + shift + (0.0 if extra is None else extra["deep"]["z"] * extra["scale"])


class Pull(Wrapper):
    """A guidance with one observation per sample."""

    describes = "guided"
    per_row = ("y",)

    def __init__(self, inner, y):
        super().__init__(inner)
        self.y = y
        self.calls = []

    def __call__(self, x, t):
        assert len(self.y) == len(x)
        self.calls.append(len(x))
        prediction = self.inner(x, t)
        return prediction.replace(prediction.raw + 0.1 * self.y)


class Own(ReverseSDE):
    """A user's subclass of the reverse SDE itself."""

    def __call__(self, x, t):
        prediction = super().__call__(x, t)
        return prediction.replace(2.0 * prediction.raw)


def test_a_subclass_survives_conditions_and_rows():
    rev = VPSDE().reverse(noise=network)
    own = Own(rev.law, rev.network, rev.parameterization)
    x, y = torch.randn(4, 3), torch.arange(4.0)
    for changed in (own.given(y=y), own.given(y=y).given(extra=None)):
        assert type(changed) is Own
        torch.testing.assert_close(changed(x, 0.5).raw, 2.0 * rev.given(y=y)(x, 0.5).raw)
        some = changed.select(torch.tensor([2, 0]))
        assert type(some) is Own
        torch.testing.assert_close(some(x[[2, 0]], 0.5).raw, changed(x, 0.5).raw[[2, 0]])
    assert "y" not in own.condition


def test_a_wrapper_is_run_with_conditions():
    """`condition=` of a run goes to the network through the wrapper, which stays around it."""
    pull = Pull(VPSDE().reverse(noise=network), torch.ones(4, 3))
    x, y = torch.randn(4, 3), torch.arange(4.0)
    solve(pull, x, Heun(), steps=3, condition={"y": y})
    assert len(pull.calls) == 6
    assert pull.describes == "guided" and pull.given(y=y).describes == "guided"

    class Stronger(Pull):
        pass

    assert Stronger(pull.inner, y).describes == "guided"
    assert Wrapper(pull).describes == "guided" and Wrapper(pull.inner).describes == "density"


@pytest.mark.parametrize("solver", [AdaptiveRungeKutta(rtol=1e-6, atol=1e-6)], ids=repr)
def test_rows_of_a_wrapper_under_an_adaptive_solver(solver):
    """Samples that finish early leave the batch with their own y and their own nested conditions."""
    g = torch.Generator().manual_seed(0)
    data = GaussianMixture([[-1.0, 0.3], [0.8, -0.5]], std=[0.05, 0.4])
    exact = data.reverse(VPSDE())

    def noise(x, knot, extra):
        assert len(extra["deep"]["z"]) == len(x) and extra["scale"] == 2.0
        return exact.network(x, knot) + 0.0 * extra["deep"]["z"]

    rev = ReverseSDE(VPSDE(), noise, exact.parameterization)
    x, y = (torch.randn(6, 2, dtype=torch.float64, generator=g) for _ in range(2))
    condition = {"extra": {"deep": {"z": y.clone()}, "scale": 2.0}}
    together = solve(Pull(rev, y), x, solver, condition=condition)
    assert len(set(together.nfe.tolist())) > 1
    for i in range(6):
        row = {"extra": {"deep": {"z": y[i : i + 1]}, "scale": 2.0}}
        alone = solve(Pull(rev, y[i : i + 1]), x[i : i + 1], solver, condition=row)
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-9, atol=1e-9)


def test_a_subclass_adds_to_the_rows_of_its_base():
    """What guidance leaves out is sliced along with the batch, in a subclass with rows of its own too."""

    class Weighted(ClassifierFreeGuidance):
        per_row = ("weight",)

        def __init__(self, inner, weight, null):
            super().__init__(inner, 2.0, null)
            self.weight = weight

    guided = Weighted(VPSDE().reverse(score=network, condition={"y": torch.arange(6.0)}), torch.ones(6), None)
    assert guided.select(torch.tensor([1, 4])).null is None
    guided = Weighted(guided.inner, torch.arange(6.0), {"y": -torch.arange(6.0)})
    some = guided.select(torch.tensor([1, 4]))
    assert some.weight.tolist() == [1, 4] and some.null["y"].tolist() == [-1, -4]
    x = torch.ones(6, 2)
    assert torch.equal(some(x[:2], 0.5).raw, guided(x, 0.5).raw[[1, 4]])


def test_a_function_with_conditions_and_a_noise_level():
    x = torch.randn(3, 2)
    seen = []

    def spy(x, level, y):
        seen.append((level, y))
        return x

    sde = VPSDE()
    knot = sde.knot(0.4)
    sde.reverse(noise=spy, condition={"y": 7})(x, 0.4)
    sde.reverse(noise=spy, condition={"y": 7}, noise_level="quarter_log_sigma")(x, 0.4)
    sde.reverse(noise=spy, condition={"y": 7}, noise_level=lambda knot: 2.0 * knot.sigma)(x, 0.4)
    CHAIN.reverse(noise=spy, condition={"y": 7})(x, 5)
    CHAIN.reverse(noise=spy, condition={"y": 7}, noise_level="time")(x, 5)
    CHAIN.reverse(noise=spy, condition={"y": 7}, noise_level="index_down")(x, 5)
    sde.reverse(noise=spy, condition={"y": 7}, noise_level=lambda knot: torch.tensor(knot.sigma))(x, 0.4)
    expected = [0.4, -0.25 * knot.half_log_snr, 2.0 * knot.sigma, 5, CHAIN.levels[5].t, 24, knot.sigma]
    for (level, y), value in zip(seen, expected, strict=True):
        assert y == 7 and level.shape == (3,) and level.tolist() == pytest.approx([value] * 3)
    assert [level.dtype for level, _ in seen[3:]] == [torch.int64, torch.float32, torch.int64, torch.float32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": network, "class_label": 3}, r"condition=\{…\}\), or \.given\(class_label=…\)"),
        ({"noise": network, "condition": 3}, "must be a mapping"),
        ({"noise": network, "noise_level": "sigmas"}, "Unknown noise_level"),
        ({"noise": network, "noise_level": "index"}, r"discretize\(n\), its `index_at`"),
        ({"noise": 3}, "must be a function"),
        ({}, "exactly one of"),
    ],
)
def test_what_reverse_refuses(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        VPSDE().reverse(**options)


def test_a_network_of_integer_levels_on_a_continuous_law():
    table = nn.Embedding(1000, 2)
    for index in (lambda x, t: table(t), lambda x, t: table.weight[t]):
        with pytest.raises(TypeError, match=r"sde\.discretize\(1000\)"):
            VPSDE().reverse(noise=index)(torch.zeros(3, 2), 0.5)
        VPSDE().discretize(1000).reverse(noise=index)(torch.zeros(3, 2), 5)


def test_a_network_that_works_in_place():
    """The state would be lost to the step that is to start from it."""
    rev = VPSDE().reverse(score=lambda x, t: x.mul_(-1.0))
    with pytest.raises(ValueError, match="in place"):
        solve(rev, torch.ones(2, 3), Heun(), steps=2)


@pytest.mark.parametrize("law", [VPSDE(), CHAIN, EDMSDE()], ids=["vp", "chain", "edm"])
def test_pickle(law):
    """With what multiprocessing and job schedulers need: a reverse of a module survives a round trip."""
    net = nn.Bilinear(2, 1, 2)

    rev = law.reverse(v=Called(net), condition={"y": torch.arange(3.0)}, noise_level="half_log_snr")
    copy = pickle.loads(pickle.dumps(rev))
    x, at = torch.randn(3, 2), 5 if isinstance(law, Chain) else 0.5
    assert torch.equal(copy(x, at).data, rev(x, at).data)
    if isinstance(law, Chain):
        assert [k.t for k in copy.law.descend(5)] == [k.t for k in law.descend(5)]
        assert torch.equal(solve(copy, x, Ancestral(), steps=5, rng=0).x, solve(rev, x, Ancestral(), steps=5, rng=0).x)


class Called(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, y):
        return self.net(x, t[:, None]) + y[:, None]


@pytest.mark.parametrize("name", [n for n in SDES if n != "tabulated"])
def test_a_chain_goes_on_between_its_levels(name):
    """`continuous` passes through the levels, `index_at` counts them, and a network of indices is asked in between."""
    sde = SDES[name]()
    if name == "flow":
        sde = SDES[name](t_max=0.9)  # a chain has no level without signal
    chain = sde.discretize(25)
    law = chain.continuous()
    assert law == sde or (isinstance(law, TabulatedSDE) and name == "vp")
    for level in chain.levels:
        knot = law.knot(level.t)
        assert knot.half_log_snr == pytest.approx(level.half_log_snr, abs=1e-4 if isinstance(law, VESDE) else 1e-12)
        assert chain.index_at(knot) == pytest.approx(level.index, abs=1e-9)
    middle = torch.tensor([0.5 * (chain.levels[3].t + chain.levels[4].t)], dtype=torch.float64)
    assert float(chain.index_at(law.knot(middle, ndim=2))) == pytest.approx(3.5)
    seen = []
    rev = law.reverse(noise=lambda x, i: seen.append(float(i[0])) or 0.0 * x, noise_level=chain.index_at)
    solve(rev, torch.zeros(1, 2), TorchDiffEq(rtol=1e-3, atol=1e-3))
    assert min(seen) >= -1e-4 and max(seen) <= 24.0 + 1e-4 and any(abs(i - round(i)) > 0.1 for i in seen)


def test_a_chain_that_no_sde_passes_through():
    alpha, lam = [2.0, 1.0, 0.5], [2.0, 0.0, -2.0]
    chain = Chain([0.0, 0.5, 1.0], lam, alpha, [a * math.exp(-v) for a, v in zip(alpha, lam, strict=True)], 1.0)
    with pytest.raises(ValueError, match="does not know an SDE"):
        chain.continuous()


def test_kernels_where_nothing_is_left_of_the_data():
    """From alpha = 0 to itself nothing happens; a law whose alpha underflows is refused when it is made."""
    sde = SDES["flow"]()
    for knot in (sde.knot(1.0), sde.knot(torch.ones(2, dtype=torch.float64))):
        other = sde.knot(knot.t)
        kernel, back = transition(other, knot), posterior(other, knot)
        found_wanted = zip((*kernel, *back), (1.0, 0.0, 1.0, 0.0, 0.0), strict=True)
        for found, wanted in found_wanted:
            assert torch.equal(torch.as_tensor(found, dtype=torch.float64).expand(2), torch.full((2,), wanted).double())
    with pytest.raises(ValueError, match=r"lower `beta_max`"):
        VPSDE(beta_max=5000.0)
