"""NCSN++ on 64 x 64 CelebA on the VE SDE's chain of 1000 levels.

Source: Song et al. 2021, arXiv:2011.13456; configs/ve/celeba_ncsnpp of score_sde_pytorch.
Published: no figures known.
"""

from scoresde.config import load


def get_config():
    c = load("ve/_chain")
    c.data.shape = (3, 64, 64)
    c.sde.ve.sigma_max = 180.0  # published for data in [0, 1]: 90
    c.sampling.solver.predictor_corrector.snr = 0.17
    return c
