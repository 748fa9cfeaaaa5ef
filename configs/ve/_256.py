"""NCSN++ on 256 x 256 images under the VE SDE, with pyramids of the input and the output."""

from scoresde.config import load


def get_config():
    c = load("ve/_cifar10")
    c.data.shape = (3, 256, 256)
    c.sde.ve.sigma_max = 756.0  # published for data in [0, 1]: 378
    n = c.network.ncsnpp
    n.multipliers = (1, 1, 2, 2, 2, 2, 2)
    n.blocks = 2
    n.dropout = 0.0
    n.input_pyramid = n.output_pyramid = "skip"
    c.training.batch_size = 64
    c.training.steps = 2_400_000
    c.sampling.solver.predictor_corrector.snr = 0.075
    c.sampling.steps = 2000
    return c
