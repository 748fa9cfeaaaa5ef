"""What the sections of `gpu.py` share: rows, times, precisions, and the models that are measured."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scoresde import ScoreModel
from scoresde.data.conditions import classes
from scoresde.data.spec import DataSpec
from scoresde.networks import ADM, DiT, NCSNpp
from sde_lib import EDMSDE, VESDE, VPSDE


@dataclass
class Run:
    """Where a section runs, how large, until when, and where its rows go.

    Attributes:
        device: "cuda", or "cpu" for a small rehearsal.
        small: reduced width, few steps.
        out: file of JSON lines.
        deadline: `time.monotonic()` after which nothing more is begun.
        section: name of the section.
    """

    device: torch.device
    small: bool
    out: Path
    deadline: float
    section: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def row(self, name: str, kind: str, **values: Any) -> None:
        """Append one finding and flush it: an aborted run keeps its rows."""
        line = {"section": self.section, "name": name, "kind": kind, **values}
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{self.section}: {name}: {shown}", flush=True)

    def gate(self, name: str, error: float, bound: float, **values: Any) -> None:
        """A comparison that holds if `error` <= `bound`; NaN does not."""
        finite = error if math.isfinite(error) else str(error)  # JSON has no NaN
        self.row(name, "gate", ok=bool(error <= bound), error=finite, bound=bound, **values)

    def figure(self, name: str, value: float, unit: str, **values: Any) -> None:
        """A measurement."""
        self.row(name, "figure", value=value, unit=unit, **values)

    def do(self, name: str, work: Callable[[], None]) -> None:
        """Do one piece of a section; its failure is a row and does not stop the others."""
        if time.monotonic() > self.deadline:
            self.row(name, "skipped", why="out of time")
            return
        try:
            work()
        except Exception as error:  # whatever it is, it is the finding
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.row(name, "gate", ok=False, error=text[:400])
        self.release()

    def only_cuda(self, name: str) -> bool:
        """Whether this is a GPU; where not, a row says that the piece was left out."""
        if not self.cuda:
            self.row(name, "skipped", why="needs CUDA")
        return self.cuda

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory back and start the peak anew."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Largest memory of tensors since `release`, in GiB; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def milliseconds(self, work: Callable[[], object], seconds: float = 0.5, most: int = 50, warm: int = 2) -> float:
        """Median wall time of one call: `warm` that do not count, then for `seconds`, or `most` calls."""
        times: list[float] = []
        for i in range(2 if self.small else warm + most):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            if i >= warm or self.small:
                times.append(1e3 * (time.perf_counter() - start))
            if sum(times) > 1e3 * seconds:
                break
        return sorted(times)[len(times) // 2]


# --- precisions -------------------------------------------------------------------------------------------------------
ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "default": 2.0**-11, "bf16": 2.0**-9, "fp16": 2.0**-12}
"""Half a unit in the last place of the factors of products. "default" is what PyTorch starts with: convolutions of
cuDNN in TF32."""
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def precision(run: Run, name: str, cache: bool = True) -> Iterator[None]:
    """fp32 without TF32 anywhere, TF32 for products and convolutions, autocast, or "default": nothing is changed.

    Flags are as before afterwards. The older names of the flags are used throughout: newer ones must not be mixed in.
    """
    if name == "default":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = name == "tf32"
    cast = torch.autocast(run.device.type, LOW[name], cache_enabled=cache) if name in LOW else contextlib.nullcontext()
    try:
        with cast:
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def relative(out: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float64 on the CPU."""
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    return float((out - reference).norm() / reference.norm())


# --- models -----------------------------------------------------------------------------------------------------------
def _ncsnpp(small: bool) -> ScoreModel:
    size, options = (16, {"channels": 16, "blocks": 1, "multipliers": (1, 2), "attention": (8,)}) if small else (32, {})
    network = NCSNpp((3, size, size), **options)  # type: ignore[arg-type]
    law = VESDE(sigma_min=0.02, sigma_max=100.0)
    return ScoreModel(network, law, "noise", "log_half_sigma", _spec(size), input_scaling="none")


def _ddpmpp(small: bool) -> ScoreModel:
    size, options = (16, {"channels": 16, "blocks": 1, "multipliers": (1, 2), "attention": (8,)}) if small else (32, {})
    network = NCSNpp((3, size, size), embedding="sinusoidal", fir=False, input_pyramid="none", **options)  # type: ignore[arg-type]
    return ScoreModel(network, VPSDE(t_min=1e-5), "noise", "t999", _spec(size), input_scaling="none")


def _edm(small: bool) -> ScoreModel:
    size, options = (16, {"channels": 16, "blocks": 1, "attention": (8,)}) if small else (32, {})
    multipliers = (1, 1) if small else (2, 2, 2)
    network = NCSNpp((3, size, size), multipliers=multipliers, dropout=0.13, embedding="sinusoidal", fir=False,
                     input_pyramid="none", augmentations=9, **options)  # type: ignore[arg-type]  # fmt: skip
    return ScoreModel(network, EDMSDE(), "edm", "quarter_log_sigma", _spec(size))


def _adm(small: bool) -> ScoreModel:
    options = {"channels": 16, "blocks": 1, "multipliers": (1, 2), "attention": (8,), "head_channels": 8}
    size, options = (16, options) if small else (64, {})
    network = ADM((3, size, size), classes(1000), **options)  # type: ignore[arg-type]
    return ScoreModel(network, EDMSDE(), "edm", "quarter_log_sigma", _spec(size, 1000))


def _dit(small: bool) -> ScoreModel:
    options = {"width": 32, "depth": 2, "heads": 2} if small else {"width": 384, "depth": 12, "heads": 6}
    size = 16 if small else 32
    network = DiT((4, size, size), classes(1000), **options)
    spec = DataSpec((4, size, size), conditions=classes(1000))
    return ScoreModel(network, VPSDE(), "noise", "t999", spec, input_scaling="none")


def _spec(size: int, number: int = 0) -> DataSpec:
    return DataSpec((3, size, size), levels=256, conditions=classes(number))


MODELS: dict[str, Callable[[bool], ScoreModel]] = {
    "NCSN++ (VE, CIFAR-10)": _ncsnpp,
    "DDPM++ (VP, CIFAR-10)": _ddpmpp,
    "DDPM++ (EDM, CIFAR-10)": _edm,
    "ADM (EDM, ImageNet 64)": _adm,
    "DiT-S/2 (256 latent)": _dit,
}
"""The published networks at full width; the first is what single-network sections measure."""
FIRST, EDM = "NCSN++ (VE, CIFAR-10)", "DDPM++ (EDM, CIFAR-10)"


def model_of(name: str, run: Run, **to: Any) -> ScoreModel:
    """The model in evaluation mode on the device, with weights that depend on the name alone."""
    torch.manual_seed(0)
    model = MODELS[name](run.small)
    with torch.no_grad():
        for p in model.parameters():  # branches begin at zero: let them work
            p.add_(0.02 * torch.randn_like(p))
    return model.to(**{"device": run.device, **to}).eval()


def images(model: ScoreModel, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random states of the model's shape, never zeros, on the CPU."""
    assert model.data_spec is not None
    g = torch.Generator().manual_seed(1)
    return torch.rand((n, *model.data_spec.shape), generator=g, dtype=torch.float64).mul_(2.0).sub_(1.0).to(dtype)


def forward_flops(name: str, small: bool) -> float:
    """Floating-point operations of one forward pass of one sample, two per multiply-add."""
    with torch.device("meta"):
        network: nn.Module = MODELS[name](small).network
        x, label = torch.empty((1, *network.shape)), torch.empty(1)  # type: ignore[misc]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(x, label)
    return float(counter.get_total_flops())
