"""The experiments of the papers, as configurations: their sizes and sources, and two steps of each at small width."""

import ast

import numpy as np
import pytest
import torch

from scoresde import DataSpec, log_likelihood
from scoresde import config as configs
from scoresde.data.conditions import classes
from scoresde.pretrained import score_sde
from scoresde.pretrained.experiments import EXPERIMENTS
from scoresde.training import train
from sde_lib import Chain
from solvers import sample

PUBLISHED = [name for name in configs.known() if "/" in name]
MILLIONS = {
    "ve/cifar10_ncsnpp": 62.69, "ve/cifar10_ncsnpp_continuous": 62.76, "ve/cifar10_ncsnpp_deep_continuous": 107.59,
    "vp/cifar10_ddpmpp_continuous": 61.80, "vp/cifar10_ddpmpp_deep_continuous": 106.63,
    "vp/cifar10_ncsnpp_continuous": 62.69, "vp/cifar10_ncsnpp_deep_continuous": 107.52, "vp/ddpm/cifar10": 35.22,
    "ve/church_ncsnpp_continuous": 65.57, "ve/ffhq_ncsnpp_continuous": 105.79, "vp/ddpm/church": 111.57,
    "edm/cifar10_uncond_vp": 55.73, "edm/imagenet64_adm": 295.90,
}  # fmt: skip


def number_of_classes(config):
    if not config.data.arrays.labels_key:
        return 0
    return 1000 if config.data.shape[1] == 64 else 10


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_says_where_it_comes_from_and_has_the_published_size(name):
    text = ast.get_docstring(ast.parse(configs.find(name).read_text(encoding="utf-8")))
    assert "\nSource: " in text and "arXiv:" in text and "\nPublished: " in text
    config = configs.load(name)
    spec = DataSpec(tuple(config.data.shape), 256, classes(number_of_classes(config)))
    with torch.device("meta"):
        model = configs.make_model(config, spec)
    if name in MILLIONS:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == MILLIONS[name]
    if not name.startswith("edm/"):
        assert EXPERIMENTS[name] == score_sde.signature(model.network)
    configs.make_solver(config)
    configs.make_grid(config)


def small(name, path):
    """The experiment at small width, on random 8-bit images of 16 x 16 pixels in a file."""
    config = configs.load(name)
    rng = np.random.default_rng(0)
    np.savez(path, data=rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8), labels=np.arange(24) % 3)
    section = config.network[config.network.name]
    section.channels = 8
    if "blocks" in section:
        section.blocks, section.multipliers, section.attention = 1, (1, 2), (8,)
    config.data.shape = (3, 16, 16)
    config.data.arrays.path = str(path)
    t = config.training
    t.batch_size, t.steps, t.eval_samples = 4, 2, 4
    t.tensorboard = False
    t.sample_every = t.eval_every = 0
    if config.sde.chain is not None and "levels" in section:
        config.sde.chain = section.levels = 10
    elif config.sde.chain is not None:
        config.sde.chain = 25 if config.sde.name == "vp" else 10
    config.sampling.steps = 8
    solver = config.sampling.solver[config.sampling.solver.name]
    if "corrector_steps" in solver:
        solver.corrector_steps = 1
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_two_steps_samples_and_scores(name, tmp_path):
    """Finite samples, and a finite log p, or on a chain a finite score. (A loss that is not finite ends a run.)"""
    config = small(name, tmp_path / "images.npz")
    result = train(config, tmp_path / "run", progress=False)
    assert result.step == 2
    model = result.model
    solver, grid = configs.make_solver(config), configs.make_grid(config)
    options = {"grid": None if isinstance(model.law, Chain) else grid, "steps": config.sampling.steps, "rng": 0}
    x = sample(model.reverse(), (2, 3, 16, 16), solver, end=config.sampling.end, **options).x
    assert x.shape == (2, 3, 16, 16) and bool(x.isfinite().all())
    data = torch.from_numpy(np.load(tmp_path / "images.npz")["data"][:2]).permute(0, 3, 1, 2)
    y = model.encode(data)
    if isinstance(model.law, Chain):
        assert bool(model(y, 3).score.isfinite().all())
        return
    found = log_likelihood(model.reverse(), y, steps=8, doubling=False, num_probes=1)
    assert bool(found.log_prob.isfinite().all())
