"""DDPM on 256 x 256 images of CelebA-HQ.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/ddpm/celebahq of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("vp/_chain")
    c.network.name = "ddpm"
    c.network.ddpm.up_attention = "last"
    n = c.network.ddpm
    n.multipliers = (1, 1, 2, 2, 4, 4)
    n.dropout = 0.0
    c.data.shape = (3, 256, 256)
    c.training.batch_size = 64
    c.training.steps = 2_400_000
    c.training.learning_rate = 2e-5
    return c
