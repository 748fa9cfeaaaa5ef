"""What is no number, no tensor, no time of the law: refused where it is given, with a sentence."""

import math

import pytest
import torch

from sde_lib import EDMSDE, SDES, VESDE, VPSDE, GaussianMixture, TabulatedSDE, Wrapper
from solvers import BrownianPath, Recorded, sample

X = torch.randn(3, 2)
REV = GaussianMixture([[-1.0, 0.3], [0.8, -0.5]], std=0.3).reverse(VPSDE())


@pytest.mark.parametrize("n", [1, -5, 2.5, "1000", None, 10**12], ids=str)
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), EDMSDE()], ids=lambda s: type(s).__name__)
def test_numbers_of_levels(sde, n):
    """10^12 of them hung."""
    with pytest.raises(ValueError, match=r"`n` must be an int >= 2 and <= 100,000"):
        sde.discretize(n)


@pytest.mark.parametrize("name", sorted(set(SDES) - {"tabulated"}))
def test_times_of_a_law_are_numbers(name):
    sde = SDES[name]()
    for what in ("0.5", None, [0.5]):
        for function in (sde.alpha, sde.time_at, sde.knot):
            with pytest.raises(TypeError, match="must be a number or a tensor"):
                function(what)
    with pytest.raises(ValueError, match=r"shape \(\) or \(B,\)"):
        sde.knot(torch.full((2, 2), 0.5), ndim=2)


@pytest.mark.parametrize(
    ("x", "t", "error", "words"),
    [
        (X, 2.0, ValueError, "outside"),
        (X, math.nan, ValueError, "outside"),
        (X, torch.tensor([0.1, math.nan, 0.2]), ValueError, "t = nan"),
        (X, torch.tensor([0.1, 0.2]), ValueError, "B = 3"),
        (X, "0.5", TypeError, "number"),
        (X, None, TypeError, "number"),
        (X.tolist(), 0.5, TypeError, "tensor"),
        (X.long(), 0.5, TypeError, "floating point"),
    ],
)
def test_calls_of_a_reverse(x, t, error, words):
    """The same of every reverse, as of a model; a float32 end is taken for the law's own."""
    with pytest.raises(error, match=words):
        REV(x, t)
    for end in (VPSDE().t_min, VPSDE().t_max):
        assert REV(X, torch.full((3,), end, dtype=torch.float32)).data.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: GaussianMixture([[0.0, 0.0], [1.0]], std=0.1), TypeError, "`means`"),
        (lambda: GaussianMixture("means", std=0.1), TypeError, "`means`"),
        (lambda: GaussianMixture([[0.0]], std="a"), TypeError, "`std`"),
        (lambda: GaussianMixture([[0.0]], std=0.1).sample(-1), ValueError, "`n`"),
        (lambda: GaussianMixture([[0.0]], std=0.1).log_prob([[0.0]]), TypeError, "tensor"),
        (lambda: TabulatedSDE("0.9, 0.5"), TypeError, "`alphas_cumprod`"),
        (lambda: VPSDE().discretize(50).descend("10"), ValueError, "steps='10'"),
        (lambda: VPSDE().discretize(50).knot("3"), TypeError, "level"),
        (lambda: VPSDE().reverse(score=lambda x: -x), TypeError, r"fn\(x, t, \*\*condition\)"),
        (lambda: Wrapper(None), TypeError, "reverse SDE"),
        (lambda: BrownianPath("seed"), ValueError, "ints"),
        (lambda: Recorded([1.0]), TypeError, "tensors"),
        (lambda: sample(REV, 3, "heun", steps=2), ValueError, "`shape`"),
        (lambda: sample(REV, (3, 2), "heun", steps=2, dtype="float32"), TypeError, "`dtype`"),
        (lambda: sample(REV, (3, 2), "heun", steps=2, dtype=torch.int64), TypeError, "floating point"),
        (lambda: sample(REV, (3, 2), "heun", steps=2, device="gpu"), ValueError, "`device`"),
        (lambda: sample(REV, (3, 2), "heun", steps=2, rng=10**30), ValueError, "64 bits"),
        (lambda: sample(REV, (3, 2), "heun", steps=2, condition=5), TypeError, "mapping"),
        (lambda: sample(REV, (3, 2), "heun", steps=2, project=3), TypeError, "`project`"),
        (lambda: sample(REV, (3, 2), "heun", steps=2, callback=3), TypeError, "`callback`"),
    ],
)
def test_doors(call, error, words):
    with pytest.raises(error, match=words):
        call()
