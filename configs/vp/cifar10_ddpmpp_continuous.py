"""DDPM++ on CIFAR-10 under the VP SDE.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/cifar10_ddpmpp_continuous of score_sde_pytorch.
Published: FID 2.55, IS 9.58 (PC sampler, best checkpoint); NLL 3.16 bits/dim, FID 3.93 by the ODE.
"""

from scoresde.config import load


def get_config():
    return load("vp/_cifar10")
