"""DDPM on 256 x 256 images of CelebA-HQ.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/ddpm/celebahq of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    return load("vp/ddpm/_256")
