"""ADM on 64 x 64 ImageNet with classes, EDM's preconditioning.

Source: Karras et al. 2022, arXiv:2206.00364, Table 2 and its released models.
Published: FID 1.36 (511 evaluations, stochastic sampler).
"""

from scoresde.config import load


def get_config():
    c = load("edm/_cifar10")
    c.network.name = "adm"
    c.data.shape = (3, 64, 64)
    c.data.arrays.labels_key = "labels"
    t = c.training
    t.batch_size = 4096
    t.steps = 610_352
    t.learning_rate = 1e-4
    t.warmup = 2441
    t.ema_decay = 0.99994
    t.condition_dropout = "0.0"
    h = c.sampling.solver.heun
    h.s_churn, h.s_min, h.s_max, h.s_noise = 40.0, 0.05, 50.0, 1.003
    c.sampling.steps = 256
    return c
