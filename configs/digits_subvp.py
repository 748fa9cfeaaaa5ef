"""Sub-VP SDE on the 8 x 8 digits."""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.network.unet.channels = 32
    c.network.unet.dropout = 0.1
    c.sde.name = "sub_vp"
    c.model.sigma_data = 0.8
    c.training.steps = 3000
    c.training.decay = "cosine"
    return c
