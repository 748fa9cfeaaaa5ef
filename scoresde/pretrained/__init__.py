"""Published checkpoints: `load_pretrained`, and one module per format."""

from scoresde.pretrained.load import load_pretrained
from scoresde.pretrained.mapping import MismatchError

__all__ = ["MismatchError", "load_pretrained"]
