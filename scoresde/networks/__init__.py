"""Networks: ``forward(x, noise_level, **condition)``, x (B, *D), noise level (B,) -> (B, *D).

The noise level is what the score model's map makes of the time. Conditions are those that the constructor was told of
in `conditions`, by their names; one that is left out is none: see `ConditionEmbedding`. Rows never see each other.
Constructors take `shape` (D) and `conditions` from the data; every other option has a JSON-able default. A network
whose attribute `learned_variance` is true returns twice the channels; the second half says a variance.
"""

from collections.abc import Mapping

from torch import nn

from scoresde.networks.conditioning import ConditionEmbedding
from scoresde.networks.dit import DiT
from scoresde.networks.embeddings import FourierEmbedding, SinusoidalEmbedding
from scoresde.networks.mlp import MLP
from scoresde.networks.ncsn import NCSN, NCSNv2
from scoresde.networks.presets import ADM, DDPM, NCSNpp
from scoresde.networks.unet import UNet
from sde_lib import Table

NETWORKS: Mapping[str, type[nn.Module]] = Table(nn.Module, {
    "mlp": MLP,
    "unet": UNet,
    "ncsnpp": NCSNpp,
    "ddpm": DDPM,
    "adm": ADM,
    "dit": DiT,
    "ncsn": NCSN,
    "ncsnv2": NCSNv2,
})
"""Name -> class. A new network is one file and one line here. "module:Class" names one of your own."""

__all__ = [
    "ADM",
    "DDPM",
    "MLP",
    "NCSN",
    "NETWORKS",
    "ConditionEmbedding",
    "DiT",
    "FourierEmbedding",
    "NCSNpp",
    "NCSNv2",
    "SinusoidalEmbedding",
    "UNet",
]
