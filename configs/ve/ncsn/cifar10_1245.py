"""NCSN on CIFAR-10 with the second paper's levels, step sizes and averaged weights (1, 2, 4 and 5).

Source: Song & Ermon 2019, arXiv:1907.05600, and 2020, arXiv:2006.09011;
configs/ve/ncsn/cifar10_1245 of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("ve/ncsn/cifar10_124")
    c.training.ema_decay = 0.999
    return c
