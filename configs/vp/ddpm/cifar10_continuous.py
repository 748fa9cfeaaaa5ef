"""DDPM's network on CIFAR-10 under the VP SDE.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/ddpm/cifar10_continuous of score_sde_pytorch.
Published: NLL 3.21 bits/dim, FID 3.69 by the ODE.
"""

from scoresde.config import load


def get_config():
    c = load("vp/_cifar10")
    c.network.name = "ddpm"
    return c
