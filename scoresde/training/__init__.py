"""Training: the loop, the averaged weights, checkpoints and metrics."""

from scoresde.training.checkpoint import (
    CheckpointError,
    latest,
    load_model,
    read_checkpoint,
    save_checkpoint,
    save_model,
)
from scoresde.training.ema import EMA
from scoresde.training.loop import TrainingError, TrainingResult, train
from scoresde.training.metrics import Metrics, read_metrics
from scoresde.training.samples import Samples, draw_samples

__all__ = [
    "EMA",
    "CheckpointError",
    "Metrics",
    "Samples",
    "TrainingError",
    "TrainingResult",
    "draw_samples",
    "latest",
    "load_model",
    "read_checkpoint",
    "read_metrics",
    "save_checkpoint",
    "save_model",
    "train",
]
