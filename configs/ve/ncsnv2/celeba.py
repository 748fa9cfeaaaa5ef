"""NCSNv2 on 64 x 64 CelebA.

Source: Song & Ermon 2020, arXiv:2006.09011; configs/ve/ncsnv2/celeba of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("ve/ncsnv2/_ncsnv2")
    c.data.shape = (3, 64, 64)
    c.sde.chain = c.sampling.steps = 500
    c.sde.ve.sigma_max = 180.0  # published for data in [0, 1]: 90
    c.sampling.solver.predictor_corrector.snr = 0.128
    return c
