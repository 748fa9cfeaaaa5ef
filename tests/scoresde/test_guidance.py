"""Classifier-free guidance: one batch of twice the rows is two calls, on conditions of every kind; closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from scoresde import ClassifierFreeGuidance, ScoreModel, log_likelihood
from scoresde.data import ConditionSpec, DataSpec
from scoresde.data.conditions import mapped, null_condition
from scoresde.networks import NETWORKS
from sde_lib import VESDE, VPSDE, Wrapper
from solvers import DDIM, AdaptiveRungeKutta, Ancestral, Heun, solve

SHAPE = (2, 4, 4)
SPECS = {
    "class_label": ConditionSpec("class", classes=3),
    "pose": ConditionSpec("vector", (2,)),
    "low": ConditionSpec("image", (1, 4, 4)),
    "text": ConditionSpec("tokens", (2, 3)),
    "words": ConditionSpec("tokens", (2,), classes=5),
}


class RowWise(nn.Module):
    """Every element of a row by arithmetic of its own, so that no batch can change its rounding; `seen` counts rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64))
        self.seen: list[int] = []

    def forward(self, x: Tensor, level: Tensor, **condition: object) -> Tensor:
        self.seen.append(len(x))
        given: dict = {**null_condition(SPECS, len(x)), **{k: v for k, v in condition.items() if v is not None}}
        text = torch.where(given["text"]["mask"][..., None], given["text"]["tokens"], 0.125)
        words = torch.where(given["words"]["mask"], given["words"]["tokens"], -1)
        shift = given["pose"][:, 0] * text[:, 0, 1] + text[:, 1, 2] + given["pose"][:, 1] * words[:, 1] - words[:, 0]
        shift = shift.to(x.dtype)
        shift = shift / (1.0 + shift * shift)  # no function that is vectorized: the last elements are not
        scale = self.table[given["class_label"]] + level
        return scale[:, None, None, None] * x + shift[:, None, None, None] + given["low"]


def rows_of(n: int, seed: int = 0) -> dict:
    """Conditions of n samples, of every kind; the tokens of some samples are masked."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, dtype=torch.float64, generator=g)

    return {
        "class_label": torch.randint(3, (n,), generator=g),
        "pose": normal(2),
        "low": normal(1, 4, 4),
        "text": {"tokens": normal(2, 3), "mask": torch.rand(n, 2, generator=g) < 0.6},
        "words": {"tokens": torch.randint(5, (n, 2), generator=g), "mask": torch.rand(n, 2, generator=g) < 0.6},
    }


def row_wise(law=None) -> ScoreModel:
    return ScoreModel(RowWise(), law or VPSDE(), "v", "time", data_spec=DataSpec(SHAPE, conditions=SPECS))


def states(n: int) -> Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# --- one batch is two calls ------------------------------------------------------------------------------------------


class Shifted(Wrapper):
    """Something of one's own inside the guidance, with an entry per row."""

    per_row = ("by",)

    def __init__(self, inner, by):
        super().__init__(inner)
        self.by = by

    def __call__(self, x, t):
        assert len(self.by) == len(x)
        prediction = self.inner(x, t)
        return prediction.replace(prediction.raw + self.by)


@pytest.mark.parametrize("drop", [None, ("text",), ("class_label", "words")], ids=["all", "text", "class and words"])
@pytest.mark.parametrize("times", ["shared", "per sample"])
def test_one_batch_of_twice_the_rows_is_two_calls(times, drop):
    """Bitwise, and what the formula says, with what is dropped replaced by its null and everything else kept."""
    model, n, x, condition = row_wise(), 4, states(4), rows_of(4)
    seen = model.network.seen
    t = 0.4 if times == "shared" else torch.tensor([0.1, 0.9, 0.4, 0.2], dtype=torch.float64)
    knot, by = model.law.knot(t, ndim=x.ndim), states(4).cos()
    rev = Shifted(model.reverse(condition), by)
    guided = ClassifierFreeGuidance(rev, 2.5, drop=drop)
    together = guided(x, knot)
    assert seen == [2 * n] and guided.nfe_per_call == 2
    apart = ClassifierFreeGuidance(rev, 2.5, drop=drop, at_once=False)(x, knot)
    assert seen == [2 * n, n, n]
    kept = {name: value for name, value in condition.items() if drop is not None and name not in drop}
    full, free = (model(x, t, **given).raw + by for given in (condition, kept))
    assert torch.equal(together.raw, apart.raw) and torch.equal(together.raw, torch.lerp(free, full, 2.5))
    assert not torch.allclose(full, free)
    for view in ("data", "noise", "score"):
        assert torch.equal(getattr(together, view), getattr(apart, view))
    rows = torch.tensor([3, 1])
    assert torch.equal(guided.select(rows)(x[rows], knot.select(rows)).raw, together.raw[rows])
    other = rows_of(4, seed=1)
    found = guided.given(**other)(x, t).raw
    assert torch.equal(found, ClassifierFreeGuidance(Shifted(model.reverse(other), by), 2.5, drop=drop)(x, t).raw)
    for scale, raw in ((1.0, full), (0.0, free)):
        assert torch.equal(ClassifierFreeGuidance(rev, scale, drop=drop)(x, t).raw, raw)


@pytest.mark.parametrize("solver", [AdaptiveRungeKutta(rtol=1e-5, atol=1e-5), Ancestral()], ids=["adaptive", "noise"])
def test_rows_that_leave_the_batch_take_their_conditions_along(solver):
    """Finished rows leave an adaptive run one after the other; bitwise a run with two calls, and of each row alone."""
    model, x, condition = row_wise(), states(5), rows_of(5)
    options = {"rng": [3, 1, 4, 1, 5]} if solver.stochastic else {}
    steps = {"steps": 6} if solver.stochastic else {}
    rev = model.reverse(condition)
    together = solve(ClassifierFreeGuidance(rev, 1.5), x, solver, **options, **steps)
    apart = solve(ClassifierFreeGuidance(rev, 1.5, at_once=False), x, solver, **options, **steps)
    assert torch.equal(together.x, apart.x) and torch.equal(together.nfe, apart.nfe)
    assert solver.stochastic or len(set(together.nfe.tolist())) > 1
    for i in (0, 4):
        one = slice(i, i + 1)
        alone = model.reverse(mapped(lambda v, one=one: v[one], condition))
        own = {"rng": options["rng"][one]} if options else {}
        assert torch.equal(solve(ClassifierFreeGuidance(alone, 1.5), x[one], solver, **own, **steps).x, together.x[one])


def test_guidance_over_guidance():
    """A weight for each of two conditions: the inner guidance, its nulls included, is asked for twice the rows."""
    model, x, condition = row_wise(), states(3), rows_of(3)
    negative = {"text": rows_of(3, seed=2)["text"]}
    inner = ClassifierFreeGuidance(model.reverse(condition), 3.0, null=negative)
    found = ClassifierFreeGuidance(inner, 1.5, drop=("class_label",))(x, 0.3).raw
    assert model.network.seen == [12]

    def by_text(**given):
        return torch.lerp(model(x, 0.3, **{**given, **negative}).raw, model(x, 0.3, **given).raw, 3.0)

    free = {name: value for name, value in condition.items() if name != "class_label"}
    assert torch.equal(found, torch.lerp(by_text(**free), by_text(**condition), 1.5))


def test_functions_without_nulls_are_asked_twice():
    """None stands for none where no value does: the argument is left out of a call of its own. Numbers are shared."""
    seen = []

    def v(x, t, prompt=None, scale=0.0):
        seen.append((len(x), None if prompt is None else len(prompt), scale))
        return x * scale if prompt is None else x + prompt[:, None]

    x, prompt = torch.ones(3, 2), torch.arange(3.0)
    rev = VPSDE().reverse(v=v, condition={"prompt": prompt, "scale": 0.5})
    found = ClassifierFreeGuidance(rev, 3.0, drop=("prompt",))(x, 0.5).raw
    assert torch.equal(found, torch.lerp(0.5 * x, x + prompt[:, None], 3.0))
    assert seen == [(3, 3, 0.5), (3, None, 0.5)]
    found = ClassifierFreeGuidance(rev, 3.0, null={"prompt": -prompt, "scale": 0.5})(x, 0.5).raw
    assert torch.equal(found, torch.lerp(x - prompt[:, None], x + prompt[:, None], 3.0))
    assert seen[2:] == [(6, 6, 0.5)]


def test_a_run_under_guidance_is_one_graph():
    model, x, condition = row_wise(), states(3), rows_of(3)
    guided = ClassifierFreeGuidance(model.reverse(condition), 2.0, drop=("text", "class_label"))

    def run(x: Tensor) -> Tensor:
        return solve(guided, x, DDIM(), steps=2, check=False).x

    with torch.no_grad():
        expected = run(x)
        compiled = torch.compile(run, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_guided_gaussians_have_the_mean_and_variance_of_the_closed_form():
    r"""x = m c + s eps with c ~ N(0, 1): N(m c, s^2) under c and N(0, s^2 + m^2) without, Gaussian at every noise.

    Under VE the ODE of the guided score, dx/dsigma = sigma (P x - w m c / v_c) with v_c = s^2 + sigma^2, v_0 = v_c +
    m^2 and P = w / v_c + (1 - w) / v_0, is linear. Its map from sigma = b to a is x -> A(b, a) x + B, with
    A(b, a) = (v_c(a) / v_c(b))^(w / 2) (v_0(a) / v_0(b))^((1 - w) / 2) and
    B = w m c int_a^b A(sigma, a) sigma / v_c(sigma) dsigma: starts of variance b^2 end with mean B, variance A^2 b^2.
    """
    m, s, w, law = 1.3, 0.4, 2.2, VESDE(sigma_min=0.01, sigma_max=20.0)
    spec = DataSpec((1,), conditions={"place": ConditionSpec("vector", (1,))})

    class Score(nn.Module):  # F = noise = -sigma score, with the joint law's own conditional and marginal score
        def __init__(self):
            super().__init__()
            self.m = nn.Parameter(torch.tensor(m, dtype=torch.float64))  # a model computes in the dtype of its weights

        def forward(self, x, level, place=None):
            sigma, none = level.exp()[:, None], place == 0  # the null of a vector is 0, and no draw of c is exactly 0
            variance = s**2 + sigma**2 + torch.where(none, self.m**2, 0.0)
            return sigma * (x - self.m * place) / variance

    model = ScoreModel(Score(), law, "noise", "log_sigma", data_spec=spec, input_scaling="none")
    c = torch.tensor([[0.8], [-1.7], [0.3], [2.0]], dtype=torch.float64)
    guided = ClassifierFreeGuidance(model.reverse({"place": c}), w)
    a, b = (law.knot(t).sigma for t in (law.t_min, law.t_max))

    def shrink(start: float) -> float:
        conditional, free = ((v + a * a) / (v + start * start) for v in (s**2, s**2 + m**2))
        return conditional ** (w / 2) * free ** ((1 - w) / 2)

    mean = w * m * quad(lambda x: shrink(x) * x / (s**2 + x * x), a, b, epsabs=1e-11, epsrel=1e-11, limit=200)[0]
    x = law.prior_std * torch.tensor([[-1.0], [0.4], [1.2], [-0.2]], dtype=torch.float64)
    exact = shrink(b) * x + mean * c
    found = solve(guided, x, AdaptiveRungeKutta(rtol=1e-10, atol=1e-10)).x
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-7)
    # fixed steps come nearer at their orders: 1 (half the error) and 2 (a quarter)
    for solver, order in ((DDIM(), 1), (Heun(), 2)):
        errors = [(solve(guided, x, solver, steps=n).x - exact).abs().max() for n in (64, 128)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
    # and the law of many samples: sharper than the conditional one, pulled beyond its mean
    assert abs(shrink(b)) * law.prior_std < s and mean > m


# --- networks, through the model -------------------------------------------------------------------------------------

NETWORKS_SMALL = {
    "mlp": {"shape": (3,), "width": 16, "depth": 1},
    "unet": {"shape": (1, 8, 8), "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)},
    "dit": {"shape": (1, 8, 8), "width": 16, "depth": 1, "heads": 2},
}


@pytest.mark.parametrize("name", NETWORKS_SMALL)
def test_samples_of_networks_under_every_kind_of_condition(name):
    """model.sample(…, condition, guidance): scale 0 is no condition, 1 the condition, others what two calls give; to
    rounding, in double precision. Tokens behind the mask change nothing."""
    options = NETWORKS_SMALL[name]
    shape = options["shape"]
    low = ConditionSpec("image", (1, *shape[1:]) if len(shape) == 3 else (1, 2, 2))  # as large as the data
    specs = SPECS | {"low": low}
    torch.manual_seed(0)
    network = NETWORKS[name](**options, conditions=specs)
    with torch.no_grad():  # branches of conditions begin at zero
        for weight in network.parameters():
            weight.add_(0.3 * torch.randn_like(weight) / max(1, weight[0].numel()) ** 0.5 if weight.ndim else 0.1)
    model = ScoreModel(network.double(), VPSDE(), data_spec=DataSpec(shape, conditions=specs))
    condition = rows_of(3) | {"low": torch.randn(3, *low.shape, dtype=torch.float64)}

    def drawn(condition, guidance=1.0):
        return model.sample(3, DDIM(), condition, guidance, steps=3, rng=[7, 8, 9], dtype=torch.float64)

    close = {"rtol": 1e-9, "atol": 1e-9}
    full, free = drawn(condition), drawn(None)
    assert torch.equal(drawn(condition, 1.0), full)
    torch.testing.assert_close(drawn(condition, 0.0), free, **close)
    guided = drawn(condition, 2.0)
    assert min(float((a - b).abs().max()) for a, b in ((full, free), (guided, full), (guided, free))) > 1e-3
    x = torch.randn(3, *shape, dtype=torch.float64)
    together, apart = (
        ClassifierFreeGuidance(model.reverse(condition), 2.0, at_once=at_once)(x, 0.5).raw for at_once in (True, False)
    )
    torch.testing.assert_close(together, apart, **close)
    hidden = dict(condition)
    for key in ("text", "words"):
        tokens, mask = condition[key]["tokens"], condition[key]["mask"]
        other = torch.full_like(tokens, 4)
        hidden[key] = {"tokens": torch.where(mask[..., None] if tokens.ndim > 2 else mask, tokens, other), "mask": mask}
    assert torch.equal(drawn(hidden, 2.0), guided)
    for key in specs:  # each is read
        less = {k: v for k, v in condition.items() if k != key}
        assert float((drawn(less) - full).abs().max()) > 1e-5, key


@pytest.mark.parametrize("options", [{}, {"divergence": "exact", "solver": "heun", "steps": 4}], ids=["probes", "sum"])
def test_likelihoods_through_guidance(options):
    """Traces through a batch of twice the rows: at w = 1 those of the conditional model alone, with twice the calls."""
    x = states(3)[:, :1, :1, :3].reshape(3, 3)
    network = NETWORKS["mlp"]((3,), width=8, depth=1, conditions={k: SPECS[k] for k in ("class_label", "text")})
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1)
    spec = DataSpec((3,), conditions=network.condition.specs)
    model = ScoreModel(network.double(), VPSDE(), data_spec=spec)
    rev = model.reverse({name: rows_of(3)[name] for name in ("class_label", "text")})
    plain, guided = (log_likelihood(r, x, rng=0, **options) for r in (rev, ClassifierFreeGuidance(rev, 1.0)))
    torch.testing.assert_close(guided.log_prob, plain.log_prob, rtol=0, atol=1e-8)  # steps follow rounding
    assert torch.equal(guided.nfe, 2 * plain.nfe)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": math.nan}, ValueError, "finite"),
        ({"null": {}, "drop": ()}, ValueError, "not both"),
        ({"null": ["text"]}, TypeError, "must map names"),
        ({"drop": "text"}, TypeError, "sequence of names"),
        ({"drop": ("txt",)}, ValueError, "cannot drop 'txt'.*: the conditions are .*text"),
        ({"null": {"pose": torch.ones(1, 2)}}, ValueError, "has 1 rows, the condition 3"),
    ],
    ids=["nan", "both", "list", "one name", "unknown name", "rows"],
)
def test_what_guidance_refuses(options, error, message):
    with pytest.raises(error, match=message):
        ClassifierFreeGuidance(row_wise().reverse(rows_of(3)), **{"scale": 2.0, **options})(states(3), 0.5)


@pytest.mark.parametrize("condition", [None, {"text": None}], ids=["none", "none by name"])
def test_guidance_needs_a_condition(condition):
    with pytest.raises(ValueError, match="given none"):
        ClassifierFreeGuidance(row_wise().reverse(condition), 2.0)(states(3), 0.5)
