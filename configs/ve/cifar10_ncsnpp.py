"""NCSN++ on CIFAR-10 on the VE SDE's chain of 1000 levels.

Source: Song et al. 2021, arXiv:2011.13456; configs/ve/cifar10_ncsnpp of score_sde_pytorch.
Published: FID 2.45, IS 9.73.
"""

from scoresde.config import load


def get_config():
    return load("ve/_chain")
