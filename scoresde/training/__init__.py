"""Training: the loop, the averaged weights and metrics."""

from scoresde.training.ema import EMA
from scoresde.training.loop import TrainingError, TrainingResult, train
from scoresde.training.metrics import Metrics, read_metrics
from scoresde.training.samples import Samples, draw_samples

__all__ = [
    "EMA",
    "Metrics",
    "Samples",
    "TrainingError",
    "TrainingResult",
    "draw_samples",
    "read_metrics",
    "train",
]
