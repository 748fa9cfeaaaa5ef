"""One call for every checkpoint: `load_pretrained` recognises the format and returns a ready score model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from scoresde.codecs import Affine, Codec
from scoresde.data.conditions import as_specs
from scoresde.data.spec import DataSpec
from scoresde.models.score_model import ScoreModel
from scoresde.networks import NETWORKS
from scoresde.pretrained import diffusers, dit, edm, guided_diffusion, schedules, score_sde
from scoresde.pretrained.experiments import EXPERIMENTS
from scoresde.pretrained.mapping import MismatchError, scaled_output
from scoresde.storage import CheckpointError, load_model, read_tensors, usable_device
from scoresde.storage.files import read_json
from scoresde.storage.models import MOST_LEVELS, bounded
from scoresde.storage.tensors import not_finite, read_config
from sde_lib import SDES, build

PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm")

_EIGHT_BIT: dict[str, Any] = {"shift": 128.0, "scale": 127.5}
"""The middles k + 1/2 of the bins of 8-bit data are the values k / 127.5 - 1 that published models were trained on."""


@dataclass(frozen=True)
class _Found:
    """What a checkpoint says: the configuration of a `ScoreModel`, and the weights of its network."""

    config: dict[str, Any]
    convert: Callable[[nn.Module], dict[str, Tensor]]


def load_pretrained(
    path: str | Path,
    *,
    config: str | Any = None,
    overrides: Sequence[str] = (),
    ema: bool = True,
    preconditioning: str | None = None,
    size: int | None = None,
    schedule: str | None = None,
    heads: int | None = None,
    new_attention_order: bool | None = None,
    continuous: bool = False,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> ScoreModel:
    """A score model from a published checkpoint, in evaluation mode: the format is recognised by what the file holds.

    * **scoresde**: a .safetensors file, a checkpoint folder, or a run's workdir.
    * **score_sde_pytorch**: ``checkpoint_{k}.pth``. The file says little about the SDE and the network, so `config`
      names the experiment, e.g. "ve/cifar10_ncsnpp_continuous"; unset, a shipped configuration whose name is part of
      the path is taken, or the only one that fits the tensors. Data live in [-1, 1] here: sigmas of VE models are twice
      the published ones, which belong to [0, 1].
    * **EDM**: a state dict of one of its preconditioned networks; `preconditioning` says which. (Its pickles hold code
      and are never opened here: see `scoresde convert`.)
    * **guided-diffusion** and improved-diffusion: state dicts of the U-Net (a chain of 1000 levels).
    * **diffusers**: a folder with a `UNet2DModel`, alone or as ``unet/`` beside ``scheduler/``.
    * **DiT**: state dicts of facebookresearch/DiT (for latents: a chain of 1000 levels).

    Nothing is unpickled with code execution.

    Args:
        path: file or folder.
        config: name, path or ConfigDict of the experiment, for score_sde_pytorch.
        overrides: e.g. ``["--config.network.ncsnpp.channels=16"]``, on top of `config`.
        ema: averaged weights (those to sample with) or the raw ones, where a checkpoint has both.
        preconditioning: of an EDM state dict: "edm", "vp", "ve" or "iddpm".
        size: side of the images where the checkpoint does not say it (guided-diffusion, diffusers).
        schedule: of a guided-diffusion chain, "linear" or "cosine"; by default that of the published model of its size.
        heads: attention heads of a guided-diffusion network; by default those of the published model of its size.
        new_attention_order: of a guided-diffusion network, likewise.
        continuous: for models of discrete chains: the SDE through the chain's levels, for likelihoods and adaptive
            solvers. The network sees times between the levels that it was trained on.
        device: where the model goes.
        progress: a bar that says what is being done; on a terminal by default.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        CheckpointError: for pickles and damaged files.
        MismatchError: (a ValueError) for tensors that do not fit the network, naming them, and for options without
            counterpart here.
        ValueError: for an unknown format, or where the file does not say enough; the message says which option to give.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"`path` must be a path, got {type(path).__name__}.")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No such file or folder: {path}")
    device = usable_device(device)
    disable = None if progress is None else not progress
    with tqdm(total=3, desc=path.name, leave=False, disable=disable, bar_format="{desc}: {postfix} {bar}") as bar:
        bar.set_postfix_str("reading")
        own = _own(path)
        if own is not None:
            given = {"config": config, "preconditioning": preconditioning, "size": size, "schedule": schedule}
            _check_unused(path, {**given, "heads": heads, "overrides": overrides or None})
            return load_model(own, ema, device)
        with _readable(path):
            stored = None if path.is_dir() else _read(path)
            if stored is None:
                found = _diffusers(path, size)
            elif score_sde.is_checkpoint(stored):
                found = _score_sde(stored, path, config, overrides, ema)
            elif edm.is_edm(state := _tensors(stored, path)):
                found = _edm(state, preconditioning)
            elif guided_diffusion.is_guided_diffusion(state):
                found = _guided_diffusion(state, size, schedule, heads, new_attention_order)
            elif dit.is_dit(state):
                found = _dit(state, size)
            else:
                raise ValueError(
                    f"{path} holds tensors in no known format (first: {', '.join(list(state)[:3])}). Known are "
                    "scoresde, score_sde_pytorch, EDM, guided-diffusion, diffusers (a folder) and DiT."
                )
            model = _ready(found, continuous, bar)
    return model.to(device)


def _check_unused(path: Path, options: Mapping[str, Any]) -> None:
    """Raise if an option was given that files of this library's own have no use for: it would change nothing."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{path} is a model of this library, which says everything itself: leave `{given[0]}` away.")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file may hold anything under the names of a format, so that reading it may fail in any way: one sentence."""
    try:
        yield
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} looks like a published checkpoint, but its contents are not those of one "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): copy the file again."
        ) from error


def from_edm_pickle(path: str | Path, continuous: bool = False) -> ScoreModel:
    """A score model from one of EDM's network pickles, for conversion: see `scoresde.pretrained.edm_pickle`."""
    from scoresde.pretrained import edm_pickle

    state, preconditioning = edm_pickle.read(path)
    return _ready(_edm(state, preconditioning), continuous)


def _ready(found: _Found, continuous: bool, bar: Any = None) -> ScoreModel:
    plain = _continuous(found.config) if continuous else found.config
    _stage(bar, "converting")
    # names and shapes are compared before memory is taken; published networks have a few thousand modules
    with torch.device("meta"), bounded(20_000):
        network = build(NETWORKS, plain["network"], "network")
    state = found.convert(network)
    bad = not_finite(state)
    if bad is not None:
        raise CheckpointError(f"Weight {bad!r} of the checkpoint is NaN or infinite: take another one.")
    _stage(bar, "building")
    model = ScoreModel.from_config(plain)
    floating = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(floating) == 1:
        model = model.to(floating.pop())
    model.network.load_state_dict(state)
    return model.eval()


def _stage(bar: Any, name: str) -> None:
    if bar is not None:
        bar.set_postfix_str(name, refresh=False)
        bar.update()


def _continuous(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The SDE through the levels of a chain."""
    levels = plain["levels"]
    if not levels:
        return dict(plain)
    if plain["sde"]["name"] == "ve":  # geometric levels are the SDE's own
        return {**plain, "levels": 0, "index_levels": levels}
    chain = build(SDES, plain["sde"], "sde").discretize(levels)
    table = {"alphas_cumprod": chain.alphas_cumprod.tolist()}
    return {**plain, "sde": {"name": "tabulated", "tabulated": table}, "levels": 0, "index_levels": levels}


# --- files ------------------------------------------------------------------------------------------------------------
def _own(path: Path) -> Path | None:
    """What `load_model` is to read, if this is ours."""
    if path.is_dir():
        run = (path / "state.json").is_file() or (path / "checkpoints").is_dir() or any(path.glob("step_*/state.json"))
        if run or not (path / "model.safetensors").is_file():
            return path if run else None
        path = path / "model.safetensors"
    if path.suffix != ".safetensors":
        return None
    return path if read_config(path) is not None else None


def _read(path: Path) -> Any:
    """Contents of a file: safetensors, or what torch.save wrote, without running code."""
    import pickle

    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        return score_sde.load_without_code(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} could not be read without running code that it may hold ({told}). If it is a network pickle of "
            f"EDM, convert it once: scoresde convert {path.name} {path.stem}.safetensors"
        ) from error


def _tensors(stored: Any, path: Path) -> dict[str, Tensor]:
    state = stored.get("state_dict", stored) if isinstance(stored, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise ValueError(f"{path} holds no state dict, but {type(stored).__name__}.")
    return dict(state)


# --- formats ----------------------------------------------------------------------------------------------------------
def _model(network: str, options: Mapping[str, Any], sde: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    """Configuration of a score model; `sde` is {"name": …, options}."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v is not None}
    name = sde["name"]
    spec = DataSpec(tuple(options["shape"]), 256, as_specs(options["conditions"]))
    return {
        "network": {"name": network, network: options},
        "sde": {"name": name, name: {k: v for k, v in sde.items() if k != "name"}},
        "levels": 0,
        "parameterization": "noise",
        "input_scaling": "none",
        "sigma_data": 0.5,
        "data_spec": spec.to_dict(),
        "codec": _codec(Affine(spec.shape, **_EIGHT_BIT)),
        **rest,
    }


def _codec(codec: Codec) -> dict[str, Any]:
    return {"name": codec.name, codec.name: codec.config()}


def _edm(state: dict[str, Tensor], preconditioning: str | None) -> _Found:
    """Karras et al. 2022, Table 1. "vp" and "iddpm" hand over x / sqrt(1 + sigma^2): the state of a VP process."""
    if preconditioning is None:
        if "u" not in state:
            raise ValueError(
                "EDM's state dicts do not say how the network is preconditioned: pass preconditioning=\"edm\" (models "
                'of that paper\'s own training), "vp" or "ve" (its baselines), or "iddpm".'
            )
        preconditioning = "iddpm"
    if preconditioning not in PRECONDITIONINGS:
        raise ValueError(f"`preconditioning` must be one of {', '.join(PRECONDITIONINGS)}, got {preconditioning!r}.")
    name, options = edm.architecture(state)

    def convert(network: nn.Module) -> dict[str, Tensor]:
        converted = edm.convert_state(network, state)
        return scaled_output(converted, network, -1.0) if preconditioning == "ve" else converted

    if preconditioning == "edm":
        rest: dict[str, Any] = {"parameterization": "edm", "noise_level": "quarter_log_sigma", "input_scaling": "unit"}
        return _Found(_model(name, options, {"name": "edm"}, **rest), convert)
    if preconditioning == "vp":
        sde = {"name": "vp", "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5}
        return _Found(_model(name, options, sde, noise_level="t999"), convert)
    if preconditioning == "ve":
        sde = {"name": "ve", "sigma_min": 0.02, "sigma_max": 100.0}
        return _Found(_model(name, options, sde, noise_level="log_half_sigma"), convert)
    if "u" not in state:
        raise ValueError("A state dict preconditioned as iDDPM has its table of levels, `u`; this one does not.")
    # sigma / alpha of every level, the noisiest first, and 0
    table = (1.0 / (1.0 + state["u"].double().flatten().square())).flip(0)[1:].tolist()
    sde = {"name": "tabulated", "alphas_cumprod": table}
    return _Found(_model(name, options, sde, levels=len(table), noise_level="index"), convert)


def _guided_diffusion(
    state: dict[str, Tensor],
    size: int | None,
    schedule: str | None,
    heads: int | None,
    new_order: bool | None,
) -> _Found:
    options = guided_diffusion.architecture(state, size, heads)
    published = guided_diffusion.PUBLISHED.get(options["shape"][1], {})
    order = published.get("new_order", False) if new_order is None else new_order
    schedule = published.get("schedule", "linear") if schedule is None else schedule
    if schedule not in ("linear", "cosine"):
        raise ValueError(f'`schedule` must be "linear" or "cosine", got {schedule!r}.')
    sde = schedules.linear() if schedule == "linear" else schedules.cosine()
    plain = _model("adm", options, sde, levels=1000, noise_level="index")
    return _Found(plain, lambda network: guided_diffusion.convert_state(network, state, order))


def _dit(state: dict[str, Tensor], size: int | None) -> _Found:
    options = dit.architecture(state, size)
    plain = _model("dit", options, schedules.linear(), levels=1000, noise_level="index")
    spec = DataSpec(tuple(options["shape"]), conditions=as_specs(options["conditions"]))  # latents
    plain["data_spec"], plain["codec"] = spec.to_dict(), _codec(Affine(spec.shape))
    return _Found(plain, lambda network: dit.convert_state(network, state))


def _diffusers(path: Path, size: int | None) -> _Found:
    folder = path / "unet" if (path / "unet" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} is a folder without a scoresde checkpoint and without a diffusers config.json.")
    config = _section(folder / "config.json")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise MismatchError(f"{folder} holds a {config['_class_name']}; read are folders of UNet2DModel.")
    if size is not None:
        config["sample_size"] = size
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} has no safetensors file; pickled weights (.bin) are not read.")
    state: dict[str, Tensor] = {}
    for file in weights:
        state.update(_read(file))
    options = diffusers.architecture(config)
    scheduler = _scheduler(path, folder)
    ve = scheduler.get("_class_name") == "ScoreSdeVeScheduler"
    if (options["embedding"] == "fourier") != ve:
        raise MismatchError("A Fourier embedding (of log sigma) and a ScoreSdeVeScheduler go together.")

    def convert(network: nn.Module) -> dict[str, Tensor]:
        converted = diffusers.convert_state(network, state, config)
        return scaled_output(converted, network, -1.0) if ve else converted

    if ve:
        centered = config.get("center_input_sample", False)
        unit = 2.0 if centered else 1.0  # sigma for data in [0, 1], which the network recentres
        sde = {"name": "ve", "sigma_min": unit * scheduler["sigma_min"], "sigma_max": unit * scheduler["sigma_max"]}
        level = "log_half_sigma" if centered else "log_sigma"
        return _Found(_model("unet", options, sde, noise_level=level), convert)
    kinds = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise MismatchError(f"`prediction_type` = {kind!r} has no counterpart here.")
    n = scheduler.get("num_train_timesteps", 1000)
    if type(n) is not int or not 2 <= n <= MOST_LEVELS:
        raise MismatchError(f"`num_train_timesteps` must be an int in 2 … {MOST_LEVELS}, got {n!r}.")
    sde = diffusers.chain(scheduler, n)
    return _Found(_model("unet", options, sde, levels=n, noise_level="index", parameterization=kinds[kind]), convert)


def _section(path: Path) -> dict[str, Any]:
    """A configuration of diffusers."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a mapping of options, got {type(found).__name__}.")
    return found


def _scheduler(path: Path, folder: Path) -> dict[str, Any]:
    for file in (path / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if file.is_file():
            return _section(file)
    return {}  # DDPM's defaults: 1000 levels, linear betas, noise


def _score_sde(
    stored: Mapping[str, Any], path: Path, config: Any, overrides: Sequence[str], ema: bool
) -> _Found:
    from scoresde import config as configs

    state = score_sde.network_tensors(stored, str(path), ema)
    if config is None:
        config = _experiment(path, state, overrides)
    plain = _plain(configs.load(config, overrides) if isinstance(config, str) else configs.override(config, overrides))

    def convert(network: nn.Module) -> dict[str, Tensor]:
        return score_sde.converted(network, state, plain["sde"]["name"] == "ve")

    return _Found(plain, convert)


def _plain(config: Any) -> dict[str, Any]:
    """The score model's configuration in an experiment's."""
    from scoresde.config import model_config

    spec = DataSpec(tuple(config.data.shape), 256)
    return model_config(config, spec, Affine(spec.shape, **_EIGHT_BIT))


def _experiment(path: Path, state: Mapping[str, Tensor], overrides: Sequence[str]) -> str:
    """Name of the experiment: the longest that is part of the path, or the only one whose tensors these are."""
    named = [name for name in EXPERIMENTS if name in path.as_posix()]
    if named:
        return max(named, key=len)
    if overrides:
        raise ValueError("`overrides` change the options of an experiment: say which with config=<name>.")
    found = score_sde.signature_of(state)
    fitting = [name for name, known in EXPERIMENTS.items() if known == found]
    if len(fitting) > 1:
        raise ValueError(
            f"{path} does not say which experiment it belongs to; its tensors fit {', '.join(fitting)}. Pass "
            "config=<name>."
        )
    return fitting[0] if fitting else _nearest(path, state, found)


def _nearest(path: Path, state: Mapping[str, Tensor], found: score_sde.Signature) -> str:
    """Raise, saying how the file differs from the experiment that is nearest in number and size of tensors."""
    from scoresde import config as configs

    def distance(name: str) -> float:
        known = EXPERIMENTS[name]
        pairs = ((known.tensors, found.tensors), (known.elements, found.elements))
        return sum(abs(math.log(a / max(1, b))) for a, b in pairs)

    name = min(EXPERIMENTS, key=distance)
    try:
        with torch.device("meta"):
            network = build(NETWORKS, _plain(configs.load(name))["network"], "network")
        score_sde.convert_state(network, {k: v.to("meta") for k, v in state.items()})
    except MismatchError as error:
        raise MismatchError(
            f"The tensors of {path} fit none of the shipped experiments. Against the nearest, {name}: {error} Pass "
            "config=<name or path of a configuration file>, and as overrides what is different."
        ) from error
    return name
