"""Folders on the Hugging Face Hub: fetched into its cache, and uploaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SAFE = ("*.safetensors", "*.json")
"""What is fetched: files that hold no code."""


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("The Hub needs huggingface_hub: pip install 'scoresde[hub]'") from error
    return huggingface_hub


def fetch(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Path:
    """The folder of OWNER/NAME in the Hub's cache, fetched if need be: safetensors and JSON files only.

    Raises:
        ImportError: without huggingface_hub.
        ValueError: for a name that none there can have.
        FileNotFoundError: (the Hub's LocalEntryNotFoundError or RepositoryNotFoundError) if there is no such model.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"{name!r} is neither a file or folder here nor OWNER/NAME of a model on the Hub.")
    folder = _hub().snapshot_download(
        name,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        allow_patterns=list(SAFE),
    )
    return Path(folder)


def upload(
    folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None, message: str = "Add model"
) -> str:
    """Upload a folder as OWNER/NAME, made if need be; returns the address of the commit.

    Raises:
        ImportError: without huggingface_hub.
    """
    api = _hub().HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
