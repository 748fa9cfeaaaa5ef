"""DDPM++ on CIFAR-10 on the chain of 1000 levels.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/cifar10_ddpmpp of score_sde_pytorch.
Published: FID 2.78, IS 9.64.
"""

from scoresde.config import load


def get_config():
    return load("vp/_chain")
