"""Networks: forward, forward and vector-Jacobian product, training step and peak memory of NCSN++.

``python benchmarks/networks.py`` (some minutes on a CPU): the configuration ve/cifar10_ncsnpp_continuous, at reduced
width on a CPU and at full width on a GPU, as eager, channels last, compiled and in bfloat16, beside an eager
implementation of the same arithmetic as published: resampling by zeros, padding and a one-channel convolution,
attention by einsum and softmax with the B x HW x HW matrix in memory. All rows share weights and data; the losses of a
short training run show that the curves agree. A second table has what each kind of condition costs, eager.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scoresde import DenoisingScoreMatching, config
from scoresde.data import ConditionSpec, DataSpec
from scoresde.models.score_model import ScoreModel
from scoresde.networks import blocks, resampling

ROWS = ("published arithmetic, eager", "eager", "channels last", "compiled", "compiled, channels last")
LOW = ("bf16", "bf16, compiled, channels last")
NAIVE, EAGER, LAST, COMPILED, BOTH = ROWS
CONDITIONS = {
    "class of 1000": ConditionSpec("class", classes=1000),
    "vector of 512": ConditionSpec("vector", (512,)),
    "image of 3 x 32 x 32": ConditionSpec("image", (3, 32, 32)),
    "77 tokens of 768": ConditionSpec("tokens", (77, 768)),
}
"""Rows of the second table."""


# --- the same arithmetic, as published --------------------------------------------------------------------------------
def _filtered(x: Tensor, up: int, down: int, pad: tuple[int, int], gain: float) -> Tensor:
    """Zeros between the pixels, padding, a convolution of every channel by itself, every `down`-th pixel."""
    b, c, h, w = x.shape
    x = x.reshape(-1, h, 1, w, 1)
    x = F.pad(x, [0, up - 1, 0, 0, 0, up - 1]).reshape(-1, 1, h * up, w * up)
    x = F.pad(x, [pad[0], pad[1], pad[0], pad[1]])
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device)
    x = F.conv2d(x, (torch.outer(taps, taps) * gain / 64.0)[None, None])
    return x[:, :, ::down, ::down].reshape(b, c, (h * up) // down, (w * up) // down)


def _resampled(self: resampling.Resample, x: Tensor) -> Tensor:
    if self.filter is None:
        return F.avg_pool2d(x, 2) if self.way == "down" else F.interpolate(x, scale_factor=2.0)
    return _filtered(x, 1, 2, (1, 1), 1.0) if self.way == "down" else _filtered(x, 2, 1, (2, 1), 4.0)


def _attention(self: blocks.Attention, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h, w).unbind(1)
    weights = torch.einsum("bchw,bcij->bhwij", q, k) * c**-0.5
    weights = weights.reshape(b, h, w, h * w).softmax(-1).reshape(b, h, w, h, w)
    return blocks.joined(x, self.out(torch.einsum("bhwij,bcij->bchw", weights, v)), self.rescale)


@contextlib.contextmanager
def as_published() -> Iterator[None]:
    """The naive functions in place of ours."""
    kept = resampling.Resample.forward, blocks.Attention.forward
    resampling.Resample.forward = _resampled  # type: ignore[method-assign]
    blocks.Attention.forward = _attention  # type: ignore[method-assign]
    try:
        yield
    finally:
        resampling.Resample.forward, blocks.Attention.forward = kept  # type: ignore[method-assign]


# --- what is measured -------------------------------------------------------------------------------------------------
def model_of(options: argparse.Namespace, row: str = "") -> ScoreModel:
    """The score model with weights that do not depend on the row, unless it is a condition's."""
    c = config.load("ve/cifar10_ncsnpp_continuous")
    n = c.network.ncsnpp
    n.channels, n.blocks, n.dropout = options.channels, options.blocks, 0.0
    torch.manual_seed(0)
    told = {"told": CONDITIONS[row]} if row in CONDITIONS else {}
    model = config.make_model(c, DataSpec((3, 32, 32), 256, told))
    with torch.no_grad():
        for p in model.parameters():  # the branches begin at zero: let them work
            p.add_(0.02 * torch.randn_like(p))
    return model.to(options.device)


def _values(spec: ConditionSpec, n: int, g: torch.Generator, device: str) -> Any:
    """Random values of a condition; of tokens about half."""
    if spec.kind == "class":
        return torch.randint(spec.classes, (n,), generator=g).to(device)
    value = torch.randn(n, *spec.shape, generator=g).to(device)
    if spec.kind != "tokens":
        return value
    return {"tokens": value, "mask": (torch.rand(n, spec.shape[0], generator=g) < 0.5).to(device)}


def median(run: Callable[[], object], device: str, repeat: int) -> float:
    """Seconds: the median of several runs, after two that do not count."""
    times = []
    for i in range(repeat + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i > 1:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure(row: str, options: argparse.Namespace) -> None:
    """One row, in a process of its own: its peak memory is its own too."""
    device = options.device
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    low = torch.autocast(device, torch.bfloat16) if row in LOW else contextlib.nullcontext()
    with as_published() if row == NAIVE else contextlib.nullcontext():
        model = model_of(options, row)
        if "channels last" in row:
            model = model.to(memory_format=torch.channels_last)
        if "compiled" in row:
            model.network.compile()
        g = torch.Generator().manual_seed(0)
        x = torch.rand(options.batch, 3, 32, 32, generator=g).mul_(2.0).sub_(1.0).to(device)
        probe = torch.randn(options.batch, 3, 32, 32, generator=g).to(device)
        knot = model.law.knot(0.5)
        condition = {"told": _values(CONDITIONS[row], options.batch, g, device)} if row in CONDITIONS else {}
        objective, data = DenoisingScoreMatching(model), model.decode(x)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)

        def forward() -> None:
            with torch.no_grad(), low:
                model.raw(x, knot, **condition)

        def product() -> None:
            y = x.detach().requires_grad_()
            with low:
                out = model.raw(y, knot, **condition)
            torch.autograd.grad(out, y, probe.to(out.dtype))

        def step() -> float:
            with low:
                loss = objective.loss(data, condition, rng=torch.Generator().manual_seed(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        model.eval()
        for p in model.parameters():
            p.requires_grad_(False)
        times = [median(run, device, options.repeat) for run in (forward, product)]
        model.train()
        for p in model.parameters():
            p.requires_grad_(True)
        losses = [step() for _ in range(8)]
        times.append(median(step, device, options.repeat))
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cells = [f"{1e3 * t:.1f}" for t in times]
    curve = ", ".join(f"{losses[i]:.4f}" for i in (0, 3, 7))
    print(f"| {row} | {' | '.join(cells)} | {memory:.2f} | {curve} |", flush=True)


def main() -> None:
    """All rows side by side."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--channels", type=int, default=128 if cuda else 32)
    parser.add_argument("--blocks", type=int, default=4 if cuda else 2)
    parser.add_argument("--batch", type=int, default=128 if cuda else 8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--tf32", action="store_true", help="allow TF32 on a GPU")
    parser.add_argument("--row", help="measure this one only")
    options = parser.parse_args()
    if options.row:
        measure(options.row, options)
        return
    millions = sum(p.numel() for p in model_of(options).parameters()) / 1e6
    print(f"NCSN++ (VE, CIFAR-10), {options.channels} channels, {options.blocks} blocks, {millions:.2f} M parameters,")
    print(f"batch {options.batch}, {options.device}, {torch.get_num_threads()} threads\n")
    for rows in ((*ROWS, *LOW), (EAGER, *CONDITIONS)):
        table(rows)


def table(rows: tuple[str, ...]) -> None:
    """Some rows under one head."""
    print("| | forward, ms | forward and product, ms | training step, ms | peak memory, GiB | loss at steps 1, 4, 8 |")
    print("|---|---|---|---|---|---|", flush=True)
    for row in rows:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", row], check=False)
        if done.returncode:
            print(f"| {row} | failed |", flush=True)
    print()


if __name__ == "__main__":
    main()
