"""DDPM++ on CIFAR-10 under the sub-VP SDE.

Source: Song et al. 2021, arXiv:2011.13456; configs/subvp/cifar10_ddpmpp_continuous of score_sde_pytorch.
Published: FID 2.61, IS 9.56 (PC sampler, best checkpoint); NLL 3.02 bits/dim, FID 3.16 by the ODE.
"""

from scoresde.config import load


def get_config():
    return load("subvp/_cifar10")
