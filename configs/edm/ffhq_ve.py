"""NCSN++ on 64 x 64 FFHQ, EDM's preconditioning.

Source: Karras et al. 2022, arXiv:2206.00364, Table 2 and its released models.
Published: FID 2.53 (79 evaluations).
"""

from scoresde.config import load


def get_config():
    c = load("edm/ffhq_vp")
    n = c.network.ncsnpp
    n.embedding = "fourier"
    n.fir = True
    n.input_pyramid = "residual"
    return c
