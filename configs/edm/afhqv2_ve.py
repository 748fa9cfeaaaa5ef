"""NCSN++ on 64 x 64 AFHQv2, EDM's preconditioning.

Source: Karras et al. 2022, arXiv:2206.00364, Table 2 and its released models.
Published: FID 2.16 (79 evaluations).
"""

from scoresde.config import load


def get_config():
    c = load("edm/ffhq_ve")
    c.network.ncsnpp.dropout = 0.25
    return c
