"""DDPM++ on CIFAR-10 on DDPM's chain of 1000 levels."""

from scoresde.config import load


def get_config():
    c = load("vp/_cifar10")
    c.sde.chain = 1000
    c.model.noise_level = "index"
    c.sampling.solver.name = "ancestral"
    return c
