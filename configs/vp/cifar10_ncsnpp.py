"""NCSN++ on CIFAR-10 on the VP SDE's chain of 1000 levels.

Source: Song et al. 2021, arXiv:2011.13456; configs/vp/cifar10_ncsnpp of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("vp/_chain")
    n = c.network.ncsnpp
    n.fir = True
    n.input_pyramid = "residual"
    c.sampling.solver.name = "reverse_diffusion"
    return c
