"""NCSN on CIFAR-10.

Source: Song & Ermon 2019, arXiv:1907.05600, and 2020, arXiv:2006.09011;
configs/ve/ncsn/cifar10 of score_sde_pytorch.
Published: FID 25.32, IS 8.87.
"""

from scoresde.config import load


def get_config():
    return load("ve/ncsn/_ncsn")
