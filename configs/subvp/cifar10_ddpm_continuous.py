"""DDPM's network on CIFAR-10 under the sub-VP SDE.

Source: Song et al. 2021, arXiv:2011.13456; configs/subvp/cifar10_ddpm_continuous of score_sde_pytorch.
Published: NLL 3.05 bits/dim, FID 3.56 by the ODE.
"""

from scoresde.config import load


def get_config():
    c = load("subvp/_cifar10")
    c.network.name = "ddpm"
    return c
