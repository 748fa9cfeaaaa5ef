"""Nothing inside a fixed-step run, a network or a loss waits for the device: proved without one, see `devices`.

The tests marked `gpu` in `solvers/test_compiled.py` prove the same on a device, by capture.
"""

from __future__ import annotations

import pytest
import torch
from devices import META, waits
from oracles import make_sde

from scoresde import (
    EDM,
    METRICS,
    OBJECTIVES,
    TIMES,
    WEIGHTINGS,
    ClassifierFreeGuidance,
    DataSpec,
    DenoisingScoreMatching,
    ScoreModel,
)
from scoresde.data.conditions import ConditionSpec, null_condition
from scoresde.networks import NETWORKS
from sde_lib import SDES, VPSDE, FlowSDE
from solvers import SOLVERS, BrownianPath, PerSample, Recorded, solve

FIXED = [name for name, cls in SOLVERS.items() if not cls.adaptive]
IMAGES = {"shape": (3, 16, 16)}
SMALL = {
    "mlp": {"shape": (2,)},
    "unet": IMAGES | {"channels": 8, "attention": (8,)},
    "ncsnpp": IMAGES | {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (8,)},
    "ddpm": IMAGES | {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (8,)},
    "adm": IMAGES | {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (8,)},
    "dit": IMAGES | {"width": 16, "depth": 2, "heads": 2},
    "ncsn": IMAGES | {"channels": 4},
    "ncsnv2": IMAGES | {"channels": 4},
}
CONDITIONS = {
    "class_label": ConditionSpec("class", classes=3),
    "pose": ConditionSpec("vector", (4,)),
    "text": ConditionSpec("tokens", (3, 5)),
    "words": ConditionSpec("tokens", (3,), classes=7),
}


def state(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device=META)


def reverse(law, shape):
    weights = state(*shape[1:])
    return law.reverse(v=lambda x, t: torch.tanh(x * weights) * t.reshape(-1, *[1] * (x.ndim - 1)))


def projection(x, knot, draw):
    """As `inpaint`, whose values a meta tensor cannot have."""
    return torch.where(x > 0, x, knot.alpha + knot.sigma * draw.normal("inpaint", knot.half_log_snr))


@pytest.mark.parametrize("name", FIXED)
def test_no_solver_waits(name):
    """On a law with a finite prior and on one with alpha = 0, for every kind of noise, projected at every step."""
    shape = (3, 2, 4)
    x, solver = state(*shape), SOLVERS[name]()
    noises = [PerSample([5, 1, 3]), Recorded([state(*shape)] * 60)]
    if name == "euler_maruyama":  # the path is the same for every solver
        noises.append(BrownianPath([4, 9, 2]))
    for law in (VPSDE(), FlowSDE()):
        rev = reverse(law, shape)
        for noise in noises if solver.stochastic else noises[:1]:
            draw = noise.bind(x)  # before a capture
            project = projection if noise is noises[0] else None
            with waits() as seen:
                end = solve(rev, x, solver, steps=4, rng=draw, end="denoise", project=project, check=False).x
            assert end.device == META and not seen


def test_a_range_of_seeds_is_counted_on_the_device():
    """Binding them waits for nothing either; seeds without a rule are copied, once, when they are bound."""
    x = state(3, 2)
    for seeds in ([1, 2, 3], [7, 7, 7], [2**64 - 2, 2**64 - 1, 2**64], [5, -1, -7]):
        with waits() as seen:
            PerSample(seeds).bind(x)
        assert not seen
        # and are the streams of the copied ones
        counted = PerSample(seeds).bind(torch.zeros(3, 5)).normal("k")
        copied = PerSample([*seeds, 0]).bind(torch.zeros(4, 5)).normal("k")[:3]
        assert torch.equal(counted, copied)
    with waits() as seen:
        PerSample([4, 1, 3]).bind(x)
    assert len(seen) == 1 and "counter.py" in seen[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_waits(name):
    """Forward and backward, under conditions of every kind; a second pyramid for the U-Net with filters."""
    variants = [{}]
    if name == "ncsnpp":
        variants += [{"input_pyramid": "skip", "output_pyramid": "skip"}, {"resampling": "convolution"}]
        variants += [{"output_pyramid": "residual", "embedding": "sinusoidal"}]
    for more in variants:
        options = SMALL[name] | more
        if not name.startswith("ncsn") or name == "ncsnpp":
            sides = options["shape"][1:] or (2, 2)
            specs = CONDITIONS | {"low": ConditionSpec("image", (1, *sides))}
            options |= {"conditions": specs, "target_noise_level": True}
        with torch.device("meta"):
            net = NETWORKS[name](**options)
        x, level = state(2, *options["shape"]), state(2)
        given = null_condition(options.get("conditions", {}), 2, META)
        for condition in ({}, given):  # left out, and given
            with waits() as seen:
                net(x, level, **condition).sum().backward()
            assert not seen


@pytest.mark.parametrize("at_once", [True, False], ids=["one batch", "two calls"])
def test_no_guidance_waits(at_once):
    """Nor what gives a row its conditions and their nulls, of every kind."""
    specs = CONDITIONS | {"low": ConditionSpec("image", (1, 2, 2))}
    with torch.device("meta"):
        net = NETWORKS["mlp"]((2,), conditions=specs)
    model = ScoreModel(net, VPSDE(), data_spec=DataSpec((2,), conditions=specs))
    rev = model.reverse(null_condition(specs, 3, META))
    x = state(3, 2)
    for drop in (None, ("text", "class_label")):
        guided = ClassifierFreeGuidance(rev, 2.0, drop=drop, at_once=at_once)
        with waits() as seen:
            solve(guided, x, SOLVERS["heun"](), steps=2, check=False)
        assert not seen


@pytest.mark.parametrize("name", [*SDES, "chain"])
def test_no_loss_waits(name):
    """Every objective on every law, and every weighting, metric and law of times on a flow and a chain, in a loop of
    one's own, once a table has been copied to the device."""
    law = VPSDE().discretize(50) if name == "chain" else make_sde(name)
    with torch.device("meta"):
        net = NETWORKS["mlp"]((2,))
    model = ScoreModel(net, law, "v", "index" if name == "chain" else "quarter_log_sigma", DataSpec((2,), levels=9))
    made = [objective(model) for objective in OBJECTIVES.values()]
    if name in ("flow", "chain"):
        made += [DenoisingScoreMatching(model, times=times) for times in TIMES]
        made += [DenoisingScoreMatching(model, weighting=weighting) for weighting in WEIGHTINGS]
        made += [DenoisingScoreMatching(model, metric=metric) for metric in METRICS]
        made += [EDM(model, uncertainty=True, stratified=False, input_perturbation=0.1).to(META)]
    data = state(4, 2).byte()
    if name in ("chain", "tabulated"):
        for objective in made:
            objective.loss(data)
    with waits() as seen:
        for objective in made:
            objective.loss(data).backward()
    assert not seen


def test_a_wait_would_be_seen():
    """The proof can fail: a list, a copy either way and a value that is read are each found, with their place."""
    x = state(2)
    with waits() as seen:
        torch.tensor([1.0, 2.0], device=META)
        x.copy_(torch.ones(2))
        torch.ones(2).to(META)
        with pytest.raises(RuntimeError):
            float(x.sum())
        with pytest.raises(NotImplementedError):
            x.cpu()
        torch.arange(4, device=META), x.new_full((2,), 3.0), x.double(), 2.0 * x  # none of these waits
    assert [s.split()[0] for s in seen] == ["tensor", "copy_", "_to_copy", "_local_scalar_dense"]
    assert all("test_waits.py" in s for s in seen)
