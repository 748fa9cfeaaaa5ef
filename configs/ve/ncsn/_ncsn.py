"""NCSN on CIFAR-10: ten levels, annealed Langevin dynamics alone."""

from scoresde.config import load


def get_config():
    c = load("ve/_chain")
    c.network.name = "ncsn"
    c.sde.chain = c.network.ncsn.levels = 10
    c.sde.ve.sigma_max = 2.0  # published for data in [0, 1]: 1
    c.model.parameterization = "score"
    c.training.learning_rate = 1e-3
    c.training.warmup = 0
    c.training.clip = 0.0
    c.training.ema_decay = 0.0
    s = c.sampling
    s.steps = 10
    s.end = "stop"
    s.solver.predictor_corrector.predictor = "none"
    s.solver.predictor_corrector.corrector = "annealed_langevin"
    s.solver.predictor_corrector.corrector_steps = 100
    s.solver.predictor_corrector.snr = 0.316
    return c
