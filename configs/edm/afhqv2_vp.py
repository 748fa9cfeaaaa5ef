"""DDPM++ on 64 x 64 AFHQv2, EDM's preconditioning.

Source: Karras et al. 2022, arXiv:2206.00364, Table 2 and its released models.
Published: FID 1.96 (79 evaluations).
"""

from scoresde.config import load


def get_config():
    c = load("edm/ffhq_vp")
    c.network.ncsnpp.dropout = 0.25
    return c
