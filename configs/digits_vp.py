"""VP SDE on the 8 x 8 digits: the demo's model, a wall-time budget of 150 s on two CPU cores."""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.network.unet.channels = 32
    # low frequencies: the score changes slowly with the noise level, and a smooth ODE takes fewer calls
    c.network.unet.embedding = "fourier"
    c.network.unet.fourier_scale = 0.3
    c.model.noise_level = "half_log_snr"
    c.model.sigma_data = 0.8
    c.training.max_seconds = 150.0
    c.training.batch_size = 64
    # the likelihood's own weighting, with times drawn so that its weights are constant
    c.objective.denoising.weighting.name = "likelihood"
    c.objective.denoising.times.name = "importance"
    c.training.learning_rate = 3e-3
    c.training.beta2 = 0.99
    c.training.warmup = 200
    c.training.decay = "linear"
    c.training.condition_dropout = "0.5"  # the demo samples and scores without a class, too
    c.training.sample_every = 0
    return c
