"""NCSN on 64 x 64 CelebA with the second paper's noise levels and step sizes (techniques 1, 2 and 4).

Source: Song & Ermon 2019, arXiv:1907.05600, and 2020, arXiv:2006.09011;
configs/ve/ncsn/celeba_124 of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("ve/ncsn/celeba")
    c.sde.chain = c.network.ncsn.levels = c.sampling.steps = 500
    c.sde.ve.sigma_max = 180.0  # published for data in [0, 1]: 90
    s = c.sampling.solver.predictor_corrector
    s.corrector_steps = 5
    s.snr = 0.128
    return c
