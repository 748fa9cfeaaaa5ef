"""DDPM on the 8 x 8 digits: the VP SDE's chain of 1000 levels, noise prediction, ancestral sampling."""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.network.unet.channels = 32
    c.network.unet.dropout = 0.1
    c.sde.chain = 1000
    c.model.parameterization = "noise"
    c.model.noise_level = "index"
    c.model.input_scaling = "none"
    c.training.steps = 3000
    c.training.decay = "cosine"
    c.sampling.solver.name = "ancestral"
    c.sampling.steps = 100
    return c
