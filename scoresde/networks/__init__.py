"""Networks: ``forward(x, label, *, class_label=None)``, x (B, *D), label (B,) -> (B, *D).

`label` is what the score model's label map makes of the time. `class_label` is an int64 tensor (B,);
`num_classes`, one past the last class, is the null token, and None means null for every row. Rows never see each
other. Constructors take `shape` (D) and `num_classes` from the data; every other option has a default and is kept in
`options` (JSON-able), so that a checkpoint can rebuild the network.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from scoresde.networks.embeddings import FourierEmbedding, SinusoidalEmbedding
from scoresde.networks.mlp import MLP
from scoresde.networks.unet import UNet

NETWORKS: Mapping[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet}
"""Name -> class. A new network is one file and one line here."""


def network_config(network: Any) -> dict[str, Any]:
    """What `sde_lib.build` needs to make this network again: ``{"name": "unet", "unet": {options}}``.

    Raises:
        ValueError: if the network's class is not in `NETWORKS` or keeps no `options`.
    """
    for name, cls in NETWORKS.items():
        if type(network) is cls:
            return {"name": name, name: dict(network.options)}
    raise ValueError(
        f"{type(network).__name__} is not in scoresde.NETWORKS ({', '.join(NETWORKS)}), so its weights could not be "
        "loaded into a network again. Enter it in the table, or save its state_dict yourself."
    )


__all__ = ["MLP", "NETWORKS", "FourierEmbedding", "SinusoidalEmbedding", "UNet", "network_config"]
