"""NCSNv2 on CIFAR-10: 232 levels, annealed Langevin dynamics alone."""

from scoresde.config import load


def get_config():
    c = load("ve/ncsn/_ncsn")
    c.network.name = "ncsnv2"
    c.sde.chain = c.sampling.steps = 232
    c.sde.ve.sigma_max = 100.0  # published for data in [0, 1]: 50
    c.model.parameterization = "noise"
    c.training.learning_rate = 1e-4
    c.training.ema_decay = 0.999
    c.sampling.solver.predictor_corrector.corrector_steps = 5
    c.sampling.solver.predictor_corrector.snr = 0.176
    return c
