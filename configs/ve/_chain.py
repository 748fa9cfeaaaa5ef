"""NCSN++ on CIFAR-10 on the VE SDE's chain of 1000 levels."""

from scoresde.config import load


def get_config():
    c = load("ve/_cifar10")
    c.sde.chain = 1000
    c.model.noise_level = "index_down"
    c.network.ncsnpp.embedding = "sinusoidal"
    return c
