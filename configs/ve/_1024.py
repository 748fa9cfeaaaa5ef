"""NCSN++ on 1024 x 1024 images under the VE SDE."""

from scoresde.config import load


def get_config():
    c = load("ve/_256")
    c.data.shape = (3, 1024, 1024)
    c.sde.ve.sigma_max = 2696.0  # published for data in [0, 1]: 1348
    n = c.network.ncsnpp
    n.channels = 16
    n.multipliers = (1, 2, 4, 8, 16, 32, 32, 32)
    n.blocks = 1
    c.training.batch_size = 8
    c.training.ema_decay = 0.9999
    c.sampling.solver.predictor_corrector.snr = 0.15
    return c
