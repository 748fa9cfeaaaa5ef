"""NCSN on CIFAR-10 with averaged weights (technique 5 of the second paper).

Source: Song & Ermon 2019, arXiv:1907.05600, and 2020, arXiv:2006.09011;
configs/ve/ncsn/cifar10_5 of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("ve/ncsn/cifar10")
    c.training.ema_decay = 0.999
    return c
