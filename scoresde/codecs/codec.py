"""What a codec is: a map from data to the state that a model works on, and back."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from scoresde.data.spec import DataSpec


class Codec(nn.Module):
    r"""Data z, (B, *data_shape), to states x, (B, *state_shape), and back. Base class.

    What :math:`z` is for integers k (k + u, dequantized) is the `DataSpec`'s; a codec sees real numbers. A codec that
    is a bijection says how it changes volumes, so that a density of x is one of z:
    :math:`\log p(z) = \log p(x) + \log|\det dx/dz|`.

    Args:
        data_shape: of one sample of data.
        state_shape: of the state that it becomes.
    """

    name: ClassVar[str]
    """In `CODECS`; of a class of one's own "module:Class"."""

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    def __init__(self, data_shape: tuple[int, ...], state_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.data_shape, self.state_shape = tuple(data_shape), tuple(state_shape)

    @classmethod
    def fit(cls, spec: DataSpec, data: Tensor) -> Self:
        """The codec for data of a specification; what it does not say is measured on `data`, (N, *D) in data units
        (integers stand for the middles of their bins)."""
        raise NotImplementedError

    @property
    def log_volume(self) -> float | None:
        """log |det dx / dz| of one sample in nats, the same everywhere; None for a codec that is no such bijection:
        then no likelihood of data exists, and every one refuses."""
        return None

    def scales(self, like: Tensor) -> Tensor | None:
        """Standard deviations of all elements of z, (*data_shape) like a tensor, under independent noise of deviation 1
        of all elements of x, where that of z is independent, too: where every element has a scale, or all have one and
        are rotated. None elsewhere."""
        return None

    def encode(self, z: Tensor, draw: Any = None) -> Tensor:
        """Real data to states, in the dtype of z. `draw` is the noise of codecs that are random."""
        raise NotImplementedError

    def decode(self, x: Tensor) -> Tensor:
        """States to real data."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Options that the constructor rebuilds this codec from, JSON-able; tensors are in the state dict."""
        raise NotImplementedError
