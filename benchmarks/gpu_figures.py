"""What the device does in a second: networks, sampling, likelihoods, training, and the solvers' own time."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import torch
from gpu_gates import FIXED, capture, cls_draws
from gpu_rows import EDM, FIRST, MODELS, Run, forward_flops, images, model_of, precision
from torch import Tensor, nn

from scoresde import DenoisingScoreMatching, ScoreModel, log_likelihood
from sde_lib import VPSDE
from solvers import Heun, Recorded, Solver, recommend, sample, solve

COLUMNS = (("fp32", ""), ("tf32", ""), ("tf32", "channels last"), ("bf16", ""), ("bf16", "channels last"))
COMPILED = (("bf16", "compiled"), ("bf16", "channels last, compiled"), ("tf32", "compiled"))


def environment(run: Run) -> None:
    """The card, the versions, and the measured ceilings: products and copies on random data."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    if run.cuda:
        p = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            versions["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        run.row("device", "text", card=p.name, capability=f"{p.major}.{p.minor}", gib=round(p.total_memory / 2**30, 1),
                multiprocessors=p.multi_processor_count, cudnn=torch.backends.cudnn.version(), **versions)  # fmt: skip
    else:
        run.row("device", "text", card=f"CPU, {torch.get_num_threads()} threads", **versions)
    flags = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    run.row("TF32 by default", "text", **flags)
    for kind in ("fp32", "tf32", "bf16", "fp64"):
        run.do(f"product, {kind}", lambda kind=kind: run.figure(f"product, {kind}", peak(run, kind), "TFLOP/s"))  # type: ignore[misc]

    def copies() -> None:
        a = torch.rand(2**20 if run.small else 2**29, device=run.device)
        b = torch.empty_like(a)
        ms = run.milliseconds(lambda: b.copy_(a))
        run.figure("copy, read and written", 2e-6 * a.numel() * 4 / ms, "GB/s")

    run.do("copy", copies)


def peak(run: Run, kind: str) -> float:
    """TFLOP/s of a product of two square random matrices."""
    n = 256 if run.small else 4096 if kind in ("fp32", "fp64") else 8192
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(kind, torch.float32)
    a, b = (torch.randn(n, n, device=run.device).to(dtype) for _ in range(2))
    with precision(run, "tf32" if kind == "tf32" else "fp32"):
        return 2e-9 * n**3 / run.milliseconds(lambda: a @ b, 0.3)


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """cuDNN looks for the fastest convolution."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def prepared(name: str, how: str, run: Run) -> tuple[ScoreModel, torch.memory_format]:
    """The model in a layout, compiled or not."""
    model = model_of(name, run)
    layout = torch.channels_last if "channels last" in how else torch.contiguous_format
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    if "compiled" in how:
        torch._dynamo.reset()
        model.network.compile(backend="inductor" if run.cuda else "eager")
    return model, layout


def networks(run: Run) -> None:
    """Forward, and forward with backward of a loss, in every precision and layout; compiled last, for it takes long."""
    peaks = {kind: peak(run, kind) for kind in ("fp32", "tf32", "bf16")}
    columns = (*COLUMNS, *COMPILED[: 1 if run.small else 3])
    for name, (kind, how) in ((name, column) for column in columns for name in MODELS):
        if run.small and (name != FIRST or kind == "tf32"):
            continue

        def work(name: str = name, kind: str = kind, how: str = how) -> None:
            model, layout = prepared(name, how, run)
            batch = 2 if run.small else 64 if "ADM" in name else 128
            x, knot = images(model, batch).to(run.device).contiguous(memory_format=layout), model.law.knot(0.5)
            flops = forward_flops(name, run.small) * batch

            def forward() -> None:
                with torch.no_grad(), precision(run, kind):
                    model.raw(x, knot)

            def both() -> None:
                with precision(run, kind):
                    out = model.raw(x, knot)
                out.float().square().mean().backward()
                model.zero_grad()

            for what, run_it, share in (("forward", forward, 1.0), ("forward and backward", both, 3.0)):
                run.release()
                ms = run.milliseconds(run_it)
                run.figure(f"{name}: {what}, {', '.join(filter(None, (kind, how)))}", ms, "ms", batch=batch,
                           images_per_second=1e3 * batch / ms, tflops=1e-9 * share * flops / ms,
                           of_peak=1e-9 * share * flops / ms / peaks[kind], peak_gib=run.peak_gib())  # fmt: skip

        with searching():
            run.do(f"{name}, {kind}, {how}", work)


def sampling(run: Run) -> None:
    """Images per second of whole runs, eager at several batch sizes and as CUDA graphs at small ones."""
    steps, few = 2 if run.small else 18, recommend(4 if run.small else 10)
    methods: dict[str, tuple[Solver, dict[str, Any]]] = {
        f"Heun, {steps} steps": (Heun(), {"steps": steps, "grid": "karras"}),
        f"recommend({few.nfe})": (few.solver, {"nfe": few.nfe, "grid": few.grid}),
    }
    for batch in (2,) if run.small else (1, 16, 128, 512):
        for method, (solver, options) in methods.items():

            def work(batch: int = batch, method: str = method, solver: Any = solver, options: Any = options) -> None:
                model, _ = prepared(EDM, "channels last", run)
                shape = (batch, *model.data_spec.shape)  # type: ignore[union-attr]

                def eager() -> None:
                    with precision(run, "bf16"):
                        sample(model.reverse(), shape, solver, rng=0, device=run.device, **options)

                ms = run.milliseconds(eager, 2.0, 5)
                more = {"batch": batch, "ms": ms, "peak_gib": run.peak_gib()}
                run.figure(f"{method}, batch {batch}, bf16", 1e3 * batch / ms, "images/s", **more)
                if not run.cuda or batch > 16:
                    return
                x, rev = torch.randn(shape, device=run.device) * model.law.prior_std, model.reverse()

                def whole() -> Tensor:
                    with precision(run, "bf16", cache=False):
                        return solve(rev, x, solver, end="denoise", check=False, **options).x

                with torch.no_grad():
                    replay, _ = capture(run, whole)
                    ms = run.milliseconds(replay, 2.0, 5)
                name = f"{method}, batch {batch}, bf16, CUDA graph"
                run.figure(name, 1e3 * batch / ms, "images/s", batch=batch, ms=ms)

            with searching():
                run.do(f"{method}, batch {batch}", work)


def likelihoods(run: Run) -> None:
    """Images per second and memory of `log_likelihood` with its defaults but for the steps."""
    steps = 4 if run.small else 32
    for batch, tf32 in ((2, False),) if run.small else ((16, True), (64, True), (64, False), (128, True)):

        def work(batch: int = batch, tf32: bool = tf32) -> None:
            model = model_of(EDM, run)
            x = images(model, batch).to(run.device)

            def score() -> None:
                log_likelihood(model.reverse(), x, steps=steps, rng=0, tf32=tf32)

            ms = run.milliseconds(score, 1.0, 1, warm=1)
            name = f"{steps} steps, batch {batch}, {'TF32' if tf32 else 'fp32'}"
            run.figure(name, 1e3 * batch / ms, "images/s", batch=batch, ms=ms, peak_gib=run.peak_gib())

        with searching():
            run.do(f"batch {batch}, TF32 {tf32}", work)


def training(run: Run) -> None:
    """Steps per second with fused Adam and averaged weights, peak memory, and the share of the measured peak."""
    peaks = {kind: peak(run, kind) for kind in ("fp32", "tf32", "bf16")}
    columns = (("tf32", ""), ("bf16", ""), ("bf16", "channels last"), ("fp32", ""), ("bf16", "channels last, compiled"))
    for batch in (2,) if run.small else (128, 512):
        for name in (FIRST, EDM):
            for kind, how in columns[1:2] if run.small else columns:

                def work(batch: int = batch, name: str = name, kind: str = kind, how: str = how) -> None:
                    model, layout = prepared(name, how, run)
                    ms, losses = steps_of(run, model.train(), layout, batch, kind)
                    flops = 3e-9 * forward_flops(name, run.small) * batch
                    run.figure(f"{name}: batch {batch}, {', '.join(filter(None, (kind, how)))}", 1e3 / ms, "steps/s",
                               batch=batch, ms=ms, images_per_second=1e3 * batch / ms, mfu=flops / ms / peaks[kind],
                               peak_gib=run.peak_gib(), first=losses[0], last=losses[-1])  # fmt: skip

                with searching():
                    run.do(f"{name}, batch {batch}, {kind}, {how}", work)


def steps_of(
    run: Run, model: ScoreModel, layout: torch.memory_format, batch: int, kind: str
) -> tuple[float, list[float]]:
    """Milliseconds of one training step, and the losses of the first eight."""
    data = model.decode(images(model, batch)).to(run.device).contiguous(memory_format=layout)
    objective = DenoisingScoreMatching(model)
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=run.cuda)
    generator = torch.Generator().manual_seed(0)
    losses: list[Tensor] = []

    def step() -> None:
        with precision(run, kind):
            loss = objective.loss(data, rng=generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-3)
        if len(losses) < 8:
            losses.append(loss.detach())

    ms = run.milliseconds(step, 2.0, 20)
    return ms, [float(v) for v in losses]


def overhead(run: Run) -> None:
    """Microseconds per step of a solver around a network that does next to nothing, eager and as a CUDA graph."""
    steps = 4 if run.small else 50
    shape = (4, 3, 8, 8) if run.small else (64, 3, 32, 32)
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 1).to(run.device)
    x = torch.randn(shape, device=run.device)
    draws = [torch.randn(shape, device=run.device) for _ in range(8)]
    rev = VPSDE().reverse(noise=lambda y, t: net(y))

    def bare() -> None:
        with torch.no_grad():
            for _ in range(steps):
                net(x)

    run.do("network", lambda: run.figure("network alone", 1e3 * run.milliseconds(bare) / steps, "us per call"))
    names = ("ddim", "heun", "dpmpp_3m", "euler_maruyama", "dpm_solver_2", "unipc", "deis", "dpmpp_2m", "ancestral",
             "sde_dpmpp_2m", "sa_solver", "predictor_corrector")  # fmt: skip
    for name in names[:4] if run.small else names:

        def work(name: str = name) -> None:
            solver = FIXED[name]()
            noises: dict[str, Any] = {"recorded": Recorded(draws * (steps // 2 + 2))}
            if cls_draws(name, "range of seeds"):
                noises |= {"one seed": 0, "range of seeds": list(range(len(x)))}
            for kind, rng in noises.items():
                fields = {"calls": solver.nfe(steps), "noise": kind if solver.stochastic else "none"}

                def whole(rng: Any = rng) -> Tensor:
                    return solve(rev, x, solver, steps=steps, rng=rng, check=False).x

                us = 1e3 * run.milliseconds(whole, 0.3, 10) / steps
                label = f"{name}, {kind}" if solver.stochastic else name
                run.figure(f"{label}, eager", us, "us per step", **fields)
                if run.cuda and kind != "one seed":
                    with torch.no_grad():
                        replay, _ = capture(run, whole)
                        us = 1e3 * run.milliseconds(replay, 0.2, 10) / steps
                    run.figure(f"{label}, CUDA graph", us, "us per step", **fields)

        run.do(name, work)
