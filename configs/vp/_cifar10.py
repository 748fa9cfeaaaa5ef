"""DDPM++ on CIFAR-10 under the VP SDE, in continuous time."""

from scoresde.config import load


def get_config():
    c = load("_score_sde")
    c.sde.vp.t_min = 1e-5
    c.model.noise_level = "t999"
    n = c.network.ncsnpp
    n.embedding = "sinusoidal"
    n.fir = False
    n.input_pyramid = "none"
    c.sampling.solver.name = "euler_maruyama"
    return c
