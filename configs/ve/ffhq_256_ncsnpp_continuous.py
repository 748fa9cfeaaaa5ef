"""NCSN++ on 256 x 256 images of FFHQ under the VE SDE.

Source: Song et al. 2021, arXiv:2011.13456; configs/ve/ffhq_256_ncsnpp_continuous of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("ve/_256")
    c.sde.ve.sigma_max = 696.0  # published for data in [0, 1]: 348
    return c
