"""VP SDE on the 8 x 8 digits: the demo's model, a wall-time budget of 150 s on two CPU cores."""

from scoresde.config import defaults


def get_config():
    c = defaults()
    return c
