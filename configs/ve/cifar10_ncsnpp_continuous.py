"""NCSN++ on CIFAR-10 under the VE SDE.

Source: Song et al. 2021, arXiv:2011.13456; configs/ve/cifar10_ncsnpp_continuous of score_sde_pytorch.
Published: FID 2.38, IS 9.83 (PC sampler, best checkpoint).
"""

from scoresde.config import load


def get_config():
    return load("ve/_cifar10")
