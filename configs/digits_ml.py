"""Maximum likelihood on the 8 x 8 digits: sub-VP SDE, likelihood weighting, importance-sampled times.

The weighting of Song et al. 2021b (arXiv:2101.09258), under which the loss bounds the negative log likelihood, with
times drawn so that the weights are constant: the same objective with less variance.
"""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.network.unet.channels = 32
    c.network.unet.dropout = 0.1
    c.network.unet.embedding = "fourier"
    c.network.unet.fourier_scale = 0.3
    c.sde.name = "sub_vp"
    c.model.noise_level = "half_log_snr"
    c.model.sigma_data = 0.8
    c.training.steps = 3000
    c.objective.denoising.weighting.name = "likelihood"
    c.objective.denoising.times.name = "importance"
    c.objective.denoising.metric.name = "half_sum"
    c.training.decay = "cosine"
    return c
