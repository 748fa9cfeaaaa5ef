"""NCSNv2 on CIFAR-10.

Source: Song & Ermon 2020, arXiv:2006.09011; configs/ve/ncsnv2/cifar10 of score_sde_pytorch.
Published: FID 10.87, IS 8.40.
"""

from scoresde.config import load


def get_config():
    return load("ve/ncsnv2/_ncsnv2")
