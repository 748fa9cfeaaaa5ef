"""VP SDE on a two-dimensional toy with known density: a checkerboard."""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.data.name = "checkerboard"
    c.network.name = "mlp"
    c.codec.affine.shift, c.codec.affine.scale = 0.0, 1.0  # states are data, as the exact score has them
    c.model.sigma_data = 1.0
    c.training.batch_size = 512
    c.training.steps = 3000
    c.training.decay = "cosine"
    c.sampling.n = 4000
    c.sampling.batch_size = 4000
    return c
