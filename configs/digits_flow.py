"""Rectified flow on the 8 x 8 digits: the flow prediction, likelihood weighting, importance-sampled times."""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.network.unet.channels = 32
    c.network.unet.dropout = 0.1
    c.network.unet.embedding = "fourier"
    c.network.unet.fourier_scale = 0.3
    c.sde.name = "flow"
    c.model.parameterization = "flow"
    c.model.noise_level = "half_log_snr"
    c.model.sigma_data = 0.8
    c.training.steps = 3000
    c.objective.denoising.weighting.name = "likelihood"
    c.objective.denoising.times.name = "importance"
    c.training.decay = "cosine"
    return c
