"""NCSN++ on CIFAR-10, EDM's preconditioning.

Source: Karras et al. 2022, arXiv:2206.00364, Table 2 and its released models.
Published: FID 1.98 (35 evaluations).
"""

from scoresde.config import load


def get_config():
    c = load("edm/_cifar10")
    n = c.network.ncsnpp
    n.embedding = "fourier"
    n.fir = True
    n.input_pyramid = "residual"
    return c
