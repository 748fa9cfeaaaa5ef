"""NCSN++ on CIFAR-10 with classes, EDM's preconditioning.

Source: Karras et al. 2022, arXiv:2206.00364, Table 2 and its released models.
Published: FID 1.79 (35 evaluations).
"""

from scoresde.config import load


def get_config():
    c = load("edm/cifar10_uncond_ve")
    c.data.arrays.labels_key = "labels"
    c.training.condition_dropout = "0.0"
    return c
