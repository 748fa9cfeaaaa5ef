"""Models on the Hugging Face Hub: one safetensors file with its configuration, and a model card."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scoresde.data.conditions import ConditionSpec
from scoresde.models.score_model import ScoreModel
from scoresde.pretrained.load import load_pretrained
from scoresde.storage import hub, save_model
from scoresde.storage.files import write_whole

FILE = "model.safetensors"


def save_pretrained(model: ScoreModel, folder: str | Path, name: str = "OWNER/NAME") -> Path:
    """Write `model` as a folder that `from_pretrained` and `load_pretrained` read; returns the folder.

    `name` is what its card calls the model.

    Raises:
        ValueError: for a model that was put together in code, see `ScoreModel.config`.
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    save_model(model, folder / FILE)
    write_whole(folder / "README.md", card(model, name))
    return folder


def card(model: ScoreModel, name: str = "OWNER/NAME") -> str:
    """A model card: what the model is and how it is used."""
    config, spec = model.config(), model.data_spec
    network, sde = config["network"]["name"], config["sde"]["name"]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    levels = f", a chain of {config['levels']} levels" if config.get("levels") else ""
    shape = "unknown" if spec is None else " x ".join(map(str, spec.shape))
    told = [] if spec is None else [f"`{key}` ({_told(value)})" for key, value in spec.conditions.items()]
    conditions = f", told {', '.join(told)}" if told else ""
    return (
        "---\nlibrary_name: scoresde\ntags:\n- score-based-generative-model\n---\n\n# A score model\n\n"
        f"Network `{network}` ({millions:.1f} M parameters), SDE `{sde}`{levels}, parameterization "
        f"`{config.get('parameterization', 'v')}`, data {shape}{conditions}.\n\n```python\n{_example(model, name)}```\n"
    )


def _told(spec: ConditionSpec) -> str:
    """What a condition is, in a word or two."""
    if spec.kind == "class":
        return f"one of {spec.classes} classes"
    of = f" of {spec.classes} words" if spec.classes else ""
    return f"{spec.kind} {' x '.join(map(str, spec.shape))}{of}"


def _example(model: ScoreModel, name: str) -> str:
    """Code that draws samples: the default grid is the chain itself on a chain, and the recommended one on an SDE."""
    spec = model.data_spec
    load = f'model = scoresde.from_pretrained("{name}")\n'
    if spec is None:
        return f"import scoresde\n\n{load}rev = model.reverse()  # for scoresde.sample(rev, shape, …), in model units\n"
    if not spec.num_classes:
        return f'import scoresde\n\n{load}x = model.sample(16, "recommended", nfe=20)\n'
    return (
        f"import scoresde\nimport torch\n\n{load}labels = torch.arange(16) % {spec.num_classes}\n"
        'x = model.sample(16, "recommended", nfe=20, condition={"class_label": labels})\n'
    )


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    **options: Any,
) -> ScoreModel:
    """A model from a local file or folder, or from the Hub; `options` go to `load_pretrained`.

    Files are kept in the Hub's cache and found there without a network (HF_HUB_OFFLINE=1 or `local_files_only`). Only
    safetensors and JSON files are fetched.

    Raises:
        ImportError: without huggingface_hub, for a name on the Hub.
        FileNotFoundError: (the Hub's LocalEntryNotFoundError or RepositoryNotFoundError) if there is no such model.
        ValueError: see `load_pretrained`.
    """
    if Path(name).exists():
        return load_pretrained(name, **options)
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    return load_pretrained(hub.fetch(str(name), local_files_only=local_files_only, **where), **options)


def push_to_hub(
    model: ScoreModel, repo_id: str, *, private: bool = False, token: str | None = None, message: str = "Add model"
) -> str:
    """Upload `model` as OWNER/NAME, made if need be; returns the address of the commit.

    Raises:
        ImportError: without huggingface_hub.
        ValueError: for a model that was put together in code.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, repo_id)
        return hub.upload(folder, repo_id, private=private, token=token, message=message)
