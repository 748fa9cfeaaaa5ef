"""DDPM's network on CIFAR-10 on the VE SDE's chain of 1000 levels.

Source: Song et al. 2021, arXiv:2011.13456; configs/ve/cifar10_ddpm of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("ve/_chain")
    c.network.name = "ddpm"
    return c
