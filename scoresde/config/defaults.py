"""All fields and their defaults."""

from __future__ import annotations

import inspect

import ml_collections
from ml_collections import config_dict

from scoresde.config.sections import places


def defaults() -> ml_collections.ConfigDict:
    """All fields with their defaults, locked: a misspelt field is an error."""
    at = places()
    c = ml_collections.ConfigDict()
    c.seed = 0

    c.sde = at["sde"].section()
    c.sde.chain = config_dict.placeholder(int)  # number of levels of a discrete chain (DDPM, SMLD); unset: the SDE

    c.network = at["network"].section()

    c.model = ml_collections.ConfigDict()
    c.model.kind = "score_model"
    c.model.parameterization = "v"
    c.model.noise_level = "quarter_log_sigma"
    c.model.sigma_data = 0.5
    c.model.input_scaling = "unit"

    c.data = at["data"].section()
    c.codec = at["codec"].section()
    c.data.shape = config_dict.placeholder(tuple)  # (C, H, W) that an experiment is for; other data are refused

    c.objective = at["objective"].section()
    c.training = _training()

    c.sampling = _sampling()
    c.sampling.solver = at["sampling.solver"].section()
    c.sampling.grid = at["sampling.grid"].section()

    c.likelihood = _likelihood()
    c.lock()
    return c


def _training() -> ml_collections.ConfigDict:
    """How the objective is trained, and what is written on the way."""
    t = ml_collections.ConfigDict()
    t.batch_size = 128  # samples per optimizer step, over all devices and accumulated parts
    t.steps = 10_000
    t.max_seconds = 0.0  # wall-time budget instead of `steps`, not bitwise reproducible; 0: none
    t.flip = False  # mirror half of the images
    # fraction of samples trained without their conditions, for guidance and unconditional use: "0.2" for all,
    # "class_label:0.1,text:0.3" for some; "": what the data say of each
    t.condition_dropout = ""
    t.optimizer = "adamw"
    t.learning_rate = 1e-3
    t.beta1, t.beta2, t.eps = 0.9, 0.999, 1e-8
    t.weight_decay = 0.0
    t.warmup = 100  # steps
    t.decay = "constant"
    t.clip = 1.0  # global gradient norm; 0: no clipping
    t.ema_decay = 0.999
    t.phases = ""  # options that phases have of their own: "critic:learning_rate=1e-4,updates=2;generator:beta1=0"
    t.accumulation = 1  # parts per optimizer step
    t.precision = "none"
    t.channels_last = False  # images with their channels last in memory: faster convolutions on most devices
    t.compile = False  # torch.compile the network: minutes at the start, then faster steps
    t.cpu = False  # stay on the CPU even if there is an accelerator
    t.log_every = 50
    t.eval_every = 500  # held-out loss; 0: never
    t.eval_samples = 1024
    t.sample_every = 2000  # sample grid; 0: never
    t.checkpoint_every = 2000  # and at the end; 0: at the end only
    t.keep = 2
    t.tensorboard = True
    return t


def _sampling() -> ml_collections.ConfigDict:
    """How samples are drawn, beside the solver and its grid."""
    s = ml_collections.ConfigDict()
    s.n = 64
    s.batch_size = 256
    s.seed = 0
    s.steps = 18  # ignored by adaptive solvers
    s.nfe = config_dict.placeholder(int)  # budget of network calls per sample, instead of `steps`
    s.end = "denoise"
    s.guidance = 1.0  # classifier-free guidance scale; 1: none
    return s


def _likelihood() -> ml_collections.ConfigDict:
    """How many held-out samples are scored, and the options of `bits_per_dim` and `log_likelihood`."""
    from scoresde.likelihood import bits_per_dim, log_likelihood

    c = ml_collections.ConfigDict()
    c.n = config_dict.placeholder(int)  # held-out samples; unset: all
    skip = {"levels", "path", "resume", "progress", "joint", "differentiable", "check", "keep"}
    kinds = {"int | None": int, "float | None": float}
    for function in (bits_per_dim, log_likelihood):
        for option in inspect.signature(function).parameters.values():
            if option.name in skip:
                continue
            if isinstance(option.default, bool | int | float | str):
                c[option.name] = option.default
            elif option.default is None and option.annotation in kinds:
                c[option.name] = config_dict.placeholder(kinds[option.annotation])
    del c["sigma_data"]  # the model's own
    return c
