"""DDPM on 256 x 256 images."""

from scoresde.config import load


def get_config():
    c = load("vp/ddpm/cifar10")
    n = c.network.ddpm
    n.multipliers = (1, 1, 2, 2, 4, 4)
    n.dropout = 0.0
    c.data.shape = (3, 256, 256)
    c.training.batch_size = 64
    c.training.steps = 2_400_000
    c.training.learning_rate = 2e-5
    return c
