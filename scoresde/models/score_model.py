"""A network, the law it was trained for, and everything needed to use it: the score model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from scoresde.codecs import CODECS, Affine, Codec
from scoresde.data.conditions import null_condition
from scoresde.data.spec import DataSpec
from scoresde.models.description import described
from sde_lib import (
    NOISE_LEVELS,
    PARAMETERIZATIONS,
    SDE,
    SDES,
    Chain,
    Knot,
    Prediction,
    ReverseSDE,
    build,
    lookup,
    state_std,
)
from sde_lib._checks import check_positive, full_name, options_of, section_key
from sde_lib._math import Real
from sde_lib.reverse import knot_of

if TYPE_CHECKING:
    from solvers import Solver


class ScoreModel(nn.Module):
    """A score network with its law, parameterization, noise level, input scaling and data specification.

    Args:
        network: ``network(x, noise_level, **condition) -> Tensor`` like x; the noise level has shape (B,).
        law: `SDE`, or `Chain` for a network on discrete levels.
        parameterization: what the network outputs: a name in `PARAMETERIZATIONS`.
        noise_level: what it is told about the noise level: a name in `NOISE_LEVELS`.
        data_spec: what the data are; optional for a network used in model units only.
        sigma_data: standard deviation of the data in model units, for "edm" and for the input scaling.
        input_scaling: "unit" divides the input by sqrt(sigma^2 + alpha^2 sigma_data^2), so that it has unit variance
            at every noise level (EDM's c_in on any SDE); "none" hands over the state.
        config: what `from_config` was given.
        index_levels: number of levels that the noise levels "index" and "index_down" count where the law is an SDE: a
            network of a chain goes on between its levels. On a chain it is the chain's.
        codec: how data become states; integers are spread over [-1, 1) and real numbers stay as they are by default.

    A subclass that is something else than the score of a density says so in `describes`, which its reverse hands on.

    A network with the attribute `learned_variance` returns twice the channels; the second half is `log_variance`'s.

    Raises:
        ValueError: for an unknown name, or an index without a number of levels.
    """

    describes: ClassVar[str] = "density"
    """What it is a model of, one of `sde_lib.reverse.DESCRIBES`; what its `reverse` says."""

    def __init__(
        self,
        network: nn.Module,
        law: SDE | Chain,
        parameterization: str = "v",
        noise_level: str = "quarter_log_sigma",
        data_spec: DataSpec | None = None,
        sigma_data: float = 0.5,
        input_scaling: str = "unit",
        config: Mapping[str, Any] | None = None,
        index_levels: int = 0,
        codec: Codec | None = None,
    ) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(f"`network` must be a torch.nn.Module, got {type(network).__name__}.")
        if not isinstance(law, SDE | Chain):
            raise TypeError(f"`law` must be an SDE such as VPSDE() or a chain of one, got {law!r}.")
        if data_spec is not None and not isinstance(data_spec, DataSpec):
            raise TypeError(f"`data_spec` must be a DataSpec, e.g. DataSpec((2,)), got {data_spec!r}.")
        check_positive("sigma_data", sigma_data)
        kind = lookup(PARAMETERIZATIONS, parameterization, "parameterization")
        self._noise_level = lookup(NOISE_LEVELS, noise_level, "noise_level")
        if input_scaling not in ("unit", "none"):
            raise ValueError(f'`input_scaling` must be "unit" or "none", got {input_scaling!r}.')
        self.index_levels = law.index_levels or index_levels
        if noise_level.startswith("index") and self.index_levels < 2:
            raise ValueError(f'Noise level "{noise_level}" needs a chain, law=sde.discretize(n), or `index_levels`.')
        self.network, self.law, self.data_spec = network, law, data_spec
        self.codec = _codec(codec, data_spec)
        self.parameterization = kind(sigma_data) if parameterization == "edm" else kind()
        self.sigma_data, self.input_scaling = float(sigma_data), input_scaling
        self._config = None if config is None else dict(config)
        self._words: dict[str, Any] = {"parameterization": parameterization, "noise_level": noise_level}
        self._words |= {"input_scaling": input_scaling, "sigma_data": sigma_data, "index_levels": index_levels}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ScoreModel:
        """Build from a JSON-able dict: `kind` (see `MODELS`), sections `network`, `sde` and `codec`
        (``{"name": …, <name>: {options}}``), `levels` (0, or the number of levels of a chain), `data_spec`
        (`DataSpec.to_dict`), and the remaining constructor arguments.

        Raises:
            ValueError: for a section that is missing, an unknown name, or an option that does not exist.
        """
        from scoresde.networks import NETWORKS

        if not isinstance(config, Mapping):
            raise TypeError(f"`config` must be a mapping, got {type(config).__name__}.")
        missing = [name for name in ("network", "sde") if name not in config]
        known = {"kind", "network", "sde", "levels", "data_spec", *options_of(cls)} - {"law", "config"}
        unknown = [name for name in config if name not in known]
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has no entry {unknown[0]!r}"
            raise ValueError(f"The configuration of a score model {wrong}; its entries: {', '.join(sorted(known))}.")
        rest = dict(config)
        rest.pop("kind", None)
        network = build(NETWORKS, rest.pop("network"), "network")
        sde = build(SDES, rest.pop("sde"), "sde")
        levels = rest.pop("levels", 0)
        spec, codec = rest.pop("data_spec", None), rest.pop("codec", None)
        return cls(
            network,
            sde.discretize(levels) if levels else sde,
            data_spec=None if spec is None else DataSpec.from_dict(spec),
            config=config,
            codec=None if codec is None else build(CODECS, codec, "codec"),
            **rest,
        )

    def config(self) -> dict[str, Any]:
        """The dict that `from_config` rebuilds this model from (without weights).

        Raises:
            ValueError: for a model that was put together in code, of objects that do not say how they are built: a
                network of one's own says it by a method ``config()``, options of its constructor.
        """
        known = described(self.network, self.law) if self._config is None else self._config
        if known is None:
            raise ValueError(
                "This model was built from objects, so its configuration is unknown: build it with "
                "ScoreModel.from_config, give its network a method config() that returns the options of its "
                "constructor, or save its state_dict yourself."
            )
        if self._config is None:
            known = {**known, **self._words}
        config = {**known, "kind": full_name(type(self))}
        if self.data_spec is not None and self.codec is not None:
            config["data_spec"] = self.data_spec.to_dict()
            config["codec"] = {"name": self.codec.name, section_key(self.codec.name): self.codec.config()}
        return config

    @property
    def data_shape(self) -> tuple[int, ...]:
        """D, of one sample of data.

        Raises:
            ValueError: for a model without a data specification; `state_shape`, `encode` and `decode`, too.
        """
        return self._specified()[0].shape

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one state, which the network sees and solvers carry along."""
        return self._specified()[1].state_shape

    def encode(
        self, data: Tensor, u: Tensor | float | None = None, dtype: torch.dtype = torch.float32, draw: Any = None
    ) -> Tensor:
        """Data, (B, *data_shape), as states (B, *state_shape).

        Args:
            data: in data units.
            u: in [0, 1), dequantizes integers; 1/2, the middles of their bins, if None.
            dtype: of the states.
            draw: noise of codecs that are random.

        Raises:
            ValueError: for data of another shape.
        """
        spec, codec = self._specified()
        _check_rows("Data", data, spec.shape)
        return codec.encode(spec.dequantize(data, u, dtype), draw)

    def decode(self, x: Tensor) -> Tensor:
        """States (B, *state_shape) as data: integers (int64) where there are levels.

        Raises:
            ValueError: for states of another shape.
        """
        spec, codec = self._specified()
        _check_rows("States", x, codec.state_shape)
        return spec.quantize(codec.decode(x))

    def _specified(self) -> tuple[DataSpec, Codec]:
        if self.data_spec is None or self.codec is None:
            raise ValueError(
                "This model has no data_spec: it knows states only, not the data that they stand for. Build it with "
                "data_spec=DataSpec(shape)."
            )
        return self.data_spec, self.codec

    def raw(self, x: Tensor, knot: Knot, **condition: Any) -> Tensor:
        """Output of the network at a state in model units, (B, *D); in the dtype of its weights."""
        out = self._network(x, knot, condition)
        return out[:, : x.shape[1]] if self.learned_variance else out

    def _network(self, x: Tensor, knot: Knot, condition: Mapping[str, Any]) -> Tensor:
        if self.input_scaling == "unit":
            c_in: Real = 1.0 / state_std(knot, self.sigma_data)
            x_in = x * c_in.to(x.dtype) if isinstance(c_in, Tensor) else x * c_in
        else:
            x_in = x
        value = self._noise_level(knot, self.index_levels)
        level = knot.spread(value, x, torch.float32 if x.dtype.itemsize < 8 else torch.float64)
        dtype = self.dtype
        if x_in.dtype != dtype:
            x_in, level = x_in.to(dtype), level.to(dtype)
        return self.network(x_in, level, **condition)

    @property
    def learned_variance(self) -> bool:
        """Whether the network returns a variance beside its prediction."""
        return bool(getattr(self.network, "learned_variance", False))

    def log_variance(self, x: Tensor, knot: Knot, **condition: Any) -> Tensor:
        r"""Learned log variance of a chain's step from level i, (B, *D): what `elbo(variance=…)` takes.

        :math:`v \log\beta_i + (1 - v) \log\tilde\beta_i`, v = (output + 1) / 2 and :math:`\tilde\beta` the posterior's
        variance, of level 1 at level 0 (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).

        Raises:
            ValueError: for a network without a learned variance, or off a chain.
        """
        law = self.law
        if not self.learned_variance or not isinstance(law, Chain):
            raise ValueError("`log_variance` needs a network with a learned variance on a chain.")
        out = self._network(x, knot, condition)[:, x.shape[1] :]
        at = torch.as_tensor(knot.index, device=out.device)
        betas, std = law.betas.to(out.device), law.posterior_std.to(out.device)
        large, small = betas[at].log(), 2.0 * std[at.clamp(min=1)].log()
        return torch.lerp(small.to(out), large.to(out), 0.5 * (out + 1.0))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        first = next(self.network.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def device(self) -> torch.device:
        """Device of the network's weights."""
        first = next(self.network.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def predict(self, x: Tensor, knot: Knot, **condition: Any) -> Prediction:
        """The prediction at a knot."""
        return Prediction(x, knot, self.raw(x, knot, **condition), self.parameterization)

    def forward(self, x: Tensor, t: float | int | Tensor, **condition: Any) -> Prediction:
        """The prediction at state x, (B, *D) in model units, and time t, () or (B,) (an index on a chain).

        Raises:
            ValueError: if t is not finite or leaves [t_min, t_max], or its shape does not match the batch.
            TypeError: if x is not floating point.
        """
        return self.predict(x, knot_of(self.law, x, t), **condition)

    def reverse(self, condition: Mapping[str, Any] | None = None) -> ReverseSDE:
        """The reverse SDE under this model, in model units; puts the network into evaluation mode.

        Args:
            condition: keyword arguments of the network, batch first, e.g. ``{"class_label": labels}``.

        Raises:
            TypeError, ValueError: for class labels that are none of the `data_spec`'s.
        """
        self.check_condition(condition)
        self.eval()
        return _ModelReverse(self, condition)

    def check_condition(self, condition: Mapping[str, Any] | None) -> None:
        """Raise unless `condition` is None or a mapping, and of the conditions that the `data_spec` knows if it knows
        any: one's own network may take arguments that no specification describes."""
        if self.data_spec is not None and self.data_spec.conditions:
            self.data_spec.check_condition(condition)
        elif condition is not None and not isinstance(condition, Mapping):
            raise TypeError(
                f"`condition` must be a mapping of the network's arguments, e.g. {{\"class_label\": labels}}, got "
                f"{type(condition).__name__}."
            )

    def sample(
        self,
        n: int,
        solver: Solver | str,
        condition: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """n samples in data units.

        Args:
            n: number of samples.
            solver: a `Solver` or a name in `SOLVERS`; the grid is `Blended` by default, the chain's levels on a chain.
            condition: conditions by name, n rows each.
            guidance: scale of classifier-free guidance, see `ClassifierFreeGuidance`; 1: none.
            **options: of `solvers.sample` (steps, nfe, grid, end, rng, …).

        Raises:
            ValueError: if the model has no data specification, or guidance is asked for without a condition.
        """
        from scoresde.guidance import ClassifierFreeGuidance
        from solvers import sample

        shape = (n, *self.state_shape)
        if "device" in options:
            raise ValueError("A model samples where its weights are: move it, model.to(device), instead of `device`.")
        if self.data_spec is not None and self.data_spec.conditions:
            self.data_spec.check_condition(condition, n)
        rev: ReverseSDE = self.reverse(condition)
        if guidance != 1.0:
            rev = ClassifierFreeGuidance(rev, guidance)
        return self.decode(sample(rev, shape, solver, device=self.device, **options).x)


def _check_rows(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape[1:]) != shape or value.ndim == 0:
        raise ValueError(f"{what} must have shape (B, {', '.join(map(str, shape))}), got {tuple(value.shape)}.")


def _codec(codec: Codec | None, spec: DataSpec | None) -> Codec | None:
    if spec is None:
        if codec is not None:
            raise ValueError("A `codec` needs a `data_spec`, which says what the data are that it encodes.")
        return None
    codec = Affine.fit(spec) if codec is None else codec
    if not isinstance(codec, Codec):
        raise TypeError(f"`codec` must be a Codec, e.g. Affine((2,), shift=1.0, scale=2.0), got {codec!r}.")
    if codec.data_shape != spec.shape:
        raise ValueError(f"The codec is for data of shape {codec.data_shape}, the data_spec says {spec.shape}.")
    return codec


class _ModelReverse(ReverseSDE):
    """The reverse of a model: conditions that are given later are looked at, too.

    Values on an accelerator are not, since guidance gives its own at every call, and a look would wait for the device.
    """

    def __init__(self, model: ScoreModel, condition: Mapping[str, Any] | None) -> None:
        super().__init__(model.law, model.raw, model.parameterization, condition)
        self._model, self.describes = model, model.describes

    def given(self, **condition: Any) -> Self:
        if not torch.compiler.is_compiling():
            self._model.check_condition(condition)
        return super().given(**condition)

    def nulls(self, n: int, device: torch.device | str | None = None) -> dict[str, Any]:
        spec = self._model.data_spec
        return {} if spec is None else null_condition(spec.conditions, n, device)
