"""NCSNv2 on 128 x 128 LSUN bedroom.

Source: Song & Ermon 2020, arXiv:2006.09011; configs/ve/ncsnv2/bedroom of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("ve/ncsnv2/_ncsnv2")
    c.data.shape = (3, 128, 128)
    c.network.ncsnv2.multipliers = (1, 2, 2, 4, 4)
    c.sde.chain = c.sampling.steps = 1086
    c.sde.ve.sigma_max = 380.0  # published for data in [0, 1]: 190
    c.training.ema_decay = 0.9999
    s = c.sampling.solver.predictor_corrector
    s.corrector_steps = 3
    s.snr = 0.095
    return c
