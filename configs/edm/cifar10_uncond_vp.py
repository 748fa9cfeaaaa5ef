"""DDPM++ on CIFAR-10, EDM's preconditioning.

Source: Karras et al. 2022, arXiv:2206.00364, Table 2 and its released models.
Published: FID 1.97 (35 evaluations).
"""

from scoresde.config import load


def get_config():
    return load("edm/_cifar10")
