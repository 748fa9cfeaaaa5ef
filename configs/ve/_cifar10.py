"""NCSN++ on CIFAR-10 under the VE SDE, in continuous time."""

from scoresde.config import load


def get_config():
    c = load("_score_sde")
    c.sde.name = "ve"
    c.sde.ve.sigma_min = 0.02  # published for data in [0, 1]: 0.01
    c.sde.ve.sigma_max = 100.0  # 50
    c.model.noise_level = "log_half_sigma"
    c.training.ema_decay = 0.999
    c.objective.denoising.metric.name = "half_sum"
    c.sampling.solver.name = "predictor_corrector"
    c.sampling.solver.predictor_corrector.corrector = "langevin"
    return c
