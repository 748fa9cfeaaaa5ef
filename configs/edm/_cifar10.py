"""What EDM's experiments share: DDPM++ on CIFAR-10, without that paper's augmentation of the images.

Source: Karras et al. 2022, arXiv:2206.00364, Table 1 and appendix F: 200 million images in batches of 512, averages
with a half-life of half a million images.
"""

from scoresde.config import load


def get_config():
    c = load("_score_sde")
    c.sde.name = "edm"
    n = c.network.ncsnpp
    n.multipliers = (2, 2, 2)
    n.embedding = "sinusoidal"
    n.fir = False
    n.input_pyramid = "none"
    n.dropout = 0.13
    n.augmentations = 9
    c.model.parameterization = "edm"
    c.model.noise_level = "quarter_log_sigma"
    c.model.input_scaling = "unit"
    c.objective.name = "edm"
    t = c.training
    t.batch_size = 512
    t.steps = 390_625
    t.learning_rate = 1e-3
    t.warmup = 19_531
    t.ema_decay = 0.99929
    t.clip = 0.0
    c.sampling.solver.name = "heun"
    c.sampling.grid.name = "karras"
    c.sampling.steps = 18
    return c
