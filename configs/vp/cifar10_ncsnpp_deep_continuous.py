"""NCSN++ with eight blocks per level on CIFAR-10 under the VP SDE.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/cifar10_ncsnpp_deep_continuous of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("vp/cifar10_ncsnpp_continuous")
    c.network.ncsnpp.blocks = 8
    c.training.steps = 950_000
    return c
