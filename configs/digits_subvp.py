"""Sub-VP SDE on the 8 x 8 digits."""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.sde.name = "sub_vp"
    c.training.steps = 3000
    c.training.decay = "cosine"
    return c
