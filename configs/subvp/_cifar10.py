"""DDPM++ on CIFAR-10 under the sub-VP SDE."""

from scoresde.config import load


def get_config():
    c = load("vp/_cifar10")
    c.sde.name = "sub_vp"
    c.sde.sub_vp.t_min = 1e-5
    return c
