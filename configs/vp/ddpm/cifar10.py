"""DDPM on CIFAR-10: the chain of 1000 levels, ancestral sampling.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/ddpm/cifar10 of score_sde_pytorch.
Published: FID 3.17, IS 9.46 (Ho et al. 2020; 3.24 for this checkpoint); NLL 3.28 bits/dim, FID 3.37 by the ODE.
"""

from scoresde.config import load


def get_config():
    c = load("vp/_chain")
    c.network.name = "ddpm"
    return c
