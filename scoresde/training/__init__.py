"""Training: the loop that drives any objective, the averaged weights and metrics."""

from scoresde.training.averages import Averages
from scoresde.training.journal import TrainingError
from scoresde.training.loop import TrainingResult, train
from scoresde.training.metrics import Metrics, read_metrics
from scoresde.training.samples import Samples, draw_samples

__all__ = [
    "Averages",
    "Metrics",
    "Samples",
    "TrainingError",
    "TrainingResult",
    "draw_samples",
    "read_metrics",
    "train",
]
