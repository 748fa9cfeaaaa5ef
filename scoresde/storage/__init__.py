"""What lies on disk: tensors with their digests, checkpoints, models, whole files, and the Hub.

Everything is written beside its place, synced and renamed, or appended and synced; nothing is unpickled.
"""

from scoresde.storage.checkpoints import Checkpoint, checkpoints, latest, read_checkpoint, save_checkpoint
from scoresde.storage.models import find_model, load_model, save_model, usable_device
from scoresde.storage.tensors import CheckpointError, read_tensors, write_tensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "checkpoints",
    "find_model",
    "latest",
    "load_model",
    "read_checkpoint",
    "read_tensors",
    "save_checkpoint",
    "save_model",
    "usable_device",
    "write_tensors",
]
