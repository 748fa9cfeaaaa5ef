"""NCSN++ on 1024 x 1024 images of CelebA-HQ under the VE SDE.

Source: Song et al. 2021, arXiv:2011.13456; configs/ve/celebahq_ncsnpp_continuous of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    return load("ve/_1024")
