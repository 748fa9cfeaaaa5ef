"""What the experiments of Song et al. 2021 share; CIFAR-10's values.

Source: arXiv:2011.13456, appendices C to H, and the defaults of score_sde_pytorch. Data are 8-bit images in a file
(--config.data.arrays.path=…), mapped to [-1, 1]; VE's noise scales, which were published for [0, 1], are doubled.
"""

from scoresde.config import defaults


def get_config():
    c = defaults()
    c.seed = 42
    c.data.name = "arrays"
    c.data.arrays.levels = 256
    c.data.arrays.layout = "NHWC"
    c.data.shape = (3, 32, 32)
    c.network.name = "ncsnpp"
    c.network.ddpm.up_attention = "last"
    c.model.parameterization = "noise"
    c.model.input_scaling = "none"
    t = c.training
    t.batch_size = 128
    t.steps = 1_300_000
    t.optimizer = "adam"
    t.learning_rate = 2e-4
    t.warmup = 5000
    t.ema_decay = 0.9999
    t.flip = True
    t.eval_every = t.sample_every = t.checkpoint_every = 50_000
    c.sampling.grid.name = "uniform_time"
    c.sampling.steps = 1000
    return c
