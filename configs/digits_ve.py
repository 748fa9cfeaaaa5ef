"""VE SDE on the 8 x 8 digits, with EDM's parameterization and sigma_max the largest distance between images."""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.network.unet.channels = 32
    c.network.unet.dropout = 0.1
    c.sde.name = "ve"
    c.sde.ve.sigma_max = 9.0
    c.model.parameterization = "edm"
    c.model.sigma_data = 0.8
    c.training.steps = 3000
    c.objective.denoising.weighting.name = "raw"
    c.training.decay = "cosine"
    return c
