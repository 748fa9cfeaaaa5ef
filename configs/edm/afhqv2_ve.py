"""NCSN++ on 64 x 64 AFHQv2, EDM's preconditioning.

Source: Karras et al. 2022, arXiv:2206.00364, Table 2 and its released models.
Published: FID 2.16 (79 evaluations).
"""

from scoresde.config import load


def get_config():
    c = load("edm/_cifar10")
    c.training.ema_decay = 0.99965
    c.data.shape = (3, 64, 64)
    c.network.ncsnpp.multipliers = (1, 2, 2, 2)
    c.training.batch_size = 256
    c.training.steps = 781_250
    c.training.learning_rate = 2e-4
    c.sampling.steps = 40
    n = c.network.ncsnpp
    n.embedding = "fourier"
    n.fir = True
    n.input_pyramid = "residual"
    n.dropout = 0.25
    return c
