"""DDPM on 256 x 256 images of LSUN church.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/ddpm/church of score_sde_pytorch.
Published: FID 7.89 (Ho et al. 2020).
"""

from scoresde.config import load


def get_config():
    return load("vp/ddpm/_256")
