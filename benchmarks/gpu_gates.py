"""Correctness on the device, before anything is timed: the CPU in float64 is the reference.

Bounds. A result that went through products of unit roundoff u differs by about u times the root of the number of layers
(100 to 250), so 16 u; float32 convolutions by Winograd's or Fourier's transforms lose two more digits: 1e-4. Runs in
float64 differ by rounding alone, amplified by the steps: 1e-9.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from gpu_rows import FIRST, MODELS, ROUNDOFF, Run, images, model_of, precision, relative
from torch import Tensor, nn

from scoresde import DenoisingScoreMatching, ScoreModel, bits_per_dim, elbo, log_likelihood
from scoresde.networks import NCSNpp
from sde_lib import VPSDE, FlowSDE, GaussianMixture, ReverseSDE
from solvers import DDIM, SOLVERS, BrownianPath, Heun, PerSample, Recorded, Solver, sample, solve

EXACT = 1e-9
BOUNDS = {name: 1e-4 if name == "fp32" else 16.0 * u for name, u in ROUNDOFF.items()}
FIXED = {name: cls for name, cls in SOLVERS.items() if not cls.adaptive}
SEEDS = [11, 3, 8, 5]  # no regular sequence: copied when they are bound


def network_agreement(run: Run) -> None:
    """Every network: each precision, channels last, and the gradient, against float64 on the CPU."""
    for name in MODELS:

        def work(name: str = name) -> None:
            exact = model_of(name, run, device="cpu", dtype=torch.float64)
            x = images(exact, 2, torch.float64)
            knot, probe = exact.law.knot(0.5), torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
            y = x.clone().requires_grad_()
            reference = exact.raw(y, knot)
            (gradient,) = torch.autograd.grad((reference * probe).sum(), y)
            model = model_of(name, run)
            there = x.float().to(run.device)
            for kind in ("fp32", "tf32", "default", "bf16"):
                with torch.no_grad(), precision(run, kind):
                    run.gate(f"{name}: {kind}", relative(model.raw(there, knot), reference), BOUNDS[kind])
            with precision(run, "fp32"):
                y = there.clone().requires_grad_()
                (found,) = torch.autograd.grad((model.raw(y, knot) * probe.to(y)).sum(), y)
                run.gate(f"{name}: gradient, fp32", relative(found, gradient), BOUNDS["fp32"])
                model.to(memory_format=torch.channels_last)
                with torch.no_grad():
                    out = model.raw(there.to(memory_format=torch.channels_last), knot)
                run.gate(f"{name}: channels last, fp32", relative(out, reference), BOUNDS["fp32"])

        run.do(name, work)


def noise_agreement(run: Run) -> None:
    """A seed per sample and a Brownian path are the same numbers on both devices, up to rounding."""
    law = VPSDE()
    t, s = law.knot(0.6), law.knot(0.5)
    for dtype in (torch.float64, torch.float32):
        x = torch.zeros((4, 3, 5), dtype=dtype)
        for name, noise in (("seed per sample", PerSample(SEEDS)), ("Brownian path", BrownianPath(SEEDS))):

            def work(name: str = name, noise: PerSample | BrownianPath = noise, x: Tensor = x) -> None:
                here, there = noise.bind(x), noise.bind(x.to(run.device))
                bound = 100.0 * torch.finfo(x.dtype).eps  # a few units in the last place of cos, log, sqrt, times 7
                for what, draw in (("interval", lambda d: d(t, s)), ("key", lambda d: d.normal("a"))):
                    gap = float((draw(here) - draw(there).cpu()).abs().max())
                    run.gate(f"{name}, {what}, {x.dtype}", gap, bound)
                equal = torch.equal(here.uniform("a"), there.uniform("a").cpu())
                run.gate(f"{name}, uniform, {x.dtype}, bitwise", 0.0 if equal else 1.0, 0.0)

            run.do(f"{name}, {dtype}", work)


def mixture() -> GaussianMixture:
    """Three spots in the plane."""
    return GaussianMixture(torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]]), 0.3)


def solver_agreement(run: Run) -> None:
    """Every solver on both devices with the same noise per sample; adaptive ones may refuse another step."""
    steps = 4 if run.small else 8
    for name, cls in SOLVERS.items():

        def work(name: str = name, cls: type = cls) -> None:
            try:
                solver = cls()
                for law in (VPSDE(), FlowSDE()):
                    rev = mixture().reverse(law)
                    ends = []
                    for device in ("cpu", run.device):
                        options = {} if cls.adaptive else {"steps": steps}
                        if name in ("torchdiffeq", "torchsde", "scipy"):
                            options = {"steps": steps}
                        g = torch.Generator().manual_seed(3)
                        x = law.prior_std * torch.randn(4, 2, generator=g, dtype=torch.float64).to(device)
                        ends.append(solve(rev, x, solver, rng=SEEDS, **options).x)
                    own = name == "torchsde" and run.cuda  # its tree draws on the device it is on
                    bound = math.inf if own else 1e-5 if cls.adaptive else EXACT
                    run.gate(f"{name} on {type(law).__name__}", relative(ends[1], ends[0]), bound)
            except ModuleNotFoundError as error:
                run.row(name, "skipped", why=str(error))

        run.do(name, work)


def likelihood_agreement(run: Run) -> None:
    """log p in nats on both devices: float64 to rounding, float32 within what it reports; bounds, bits/dim."""
    exact = small_model(torch.float64, "cpu")
    x = images(exact, 4, torch.float64)
    steps = 8

    def both(**options: object) -> tuple[Tensor, Tensor]:
        there = copy.deepcopy(exact).to(run.device)
        here = log_likelihood(exact.reverse(), x, rng=SEEDS, **options)  # type: ignore[arg-type]
        found = log_likelihood(there.reverse(), x.to(run.device), rng=SEEDS, **options)  # type: ignore[arg-type]
        return found.log_prob, here.log_prob

    run.do("fixed steps, float64", lambda: run.gate("fixed steps, float64", relative(*both(steps=steps)), EXACT))

    def single() -> None:
        here = log_likelihood(exact.reverse(), x, rng=SEEDS, steps=steps)
        there = copy.deepcopy(exact).to(run.device, torch.float32)
        with precision(run, "tf32"):  # what the caller has set does not reach the likelihood
            found = log_likelihood(there.reverse(), x.float().to(run.device), rng=SEEDS, steps=steps)
            kept = torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        nats = float((found.log_prob.double().cpu() - here.log_prob).abs().max())
        run.gate("fixed steps, float32, nats", nats, 1e-2, dims=x[0].numel())
        run.gate("flags of TF32 are as before", 0.0 if kept else 1.0, 0.0)

    run.do("fixed steps, float32", single)

    def exact_trace() -> None:
        rev = mixture().reverse(VPSDE())
        y = torch.randn(4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        for what in ("exact", "hutchinson"):
            options = {"divergence": what, "tol": 1e-3, "rng": SEEDS}
            here, there = (log_likelihood(rev, y.to(d), **options) for d in ("cpu", run.device))  # type: ignore[arg-type]
            run.gate(f"{what}, adaptive", relative(there.log_prob, here.log_prob), 1e-5)

    run.do("adaptive", exact_trace)

    def bound() -> None:
        there = copy.deepcopy(exact).to(run.device)
        here = elbo(exact.reverse(), x, times=8, rng=SEEDS)
        found = elbo(there.reverse(), x.to(run.device), times=8, rng=SEEDS)
        run.gate("variational bound", relative(found.nats, here.nats), EXACT)

    run.do("variational bound", bound)

    def bits() -> None:
        data = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(5))
        there = copy.deepcopy(exact).to(run.device)
        pair = [bits_per_dim(m, data, steps=steps, progress=False).mean for m in (there, exact)]
        run.gate("bits/dim", abs(pair[0] - pair[1]) / abs(pair[1]), EXACT)

    run.do("bits/dim", bits)


def small_model(dtype: torch.dtype = torch.float32, device: object = None) -> ScoreModel:
    """An NCSN++ that compiles in seconds, for gates that need not be large."""
    from scoresde.data.spec import DataSpec

    torch.manual_seed(0)
    network = NCSNpp((3, 8, 8), channels=16, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model = ScoreModel(network, VPSDE(), "v", data_spec=DataSpec((3, 8, 8), 256))
    return model.to(device=torch.device(str(device or "cpu")), dtype=dtype).eval()


def problem(run: Run) -> tuple[ReverseSDE, Tensor, list[Tensor]]:
    """A small convolution, a state and recorded noise in float64 on the device."""
    torch.manual_seed(0)
    net = nn.Conv2d(2, 2, 3, padding=1).double().to(run.device)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=g).to(run.device)
    draws = [torch.randn(x.shape, dtype=torch.float64, generator=g).to(run.device) for _ in range(60)]
    return VPSDE().reverse(v=lambda y, t: torch.tanh(net(y)) * t.reshape(-1, 1, 1, 1)), x, draws


def no_waits(run: Run) -> None:
    """PyTorch raises at the first synchronisation: networks, solvers, a training step, a likelihood."""

    def quiet(name: str, work: Callable[[], object]) -> None:
        def twice() -> None:
            work()  # constants go to the device, kernels are chosen
            run.synchronize()
            if run.cuda:
                torch.cuda.set_sync_debug_mode("error")
            try:
                work()
            finally:
                if run.cuda:
                    torch.cuda.set_sync_debug_mode("default")
            run.gate(name, 0.0, 0.0)

        run.do(name, twice)

    for name in MODELS:
        model = model_of(name, run)
        x, knot = images(model, 2).to(run.device), model.law.knot(0.5)
        with torch.no_grad():
            quiet(name, lambda m=model, x=x, k=knot: m.raw(x, k))  # type: ignore[misc]
    rev, state, draws = problem(run)
    for name, cls in FIXED.items():
        for kind, noise in (("recorded", Recorded(draws)), ("range of seeds", range(4)), ("one seed", 0)):
            if kind == "recorded" or cls().stochastic:
                rng = list(noise) if isinstance(noise, range) else noise
                quiet(f"{name}, {kind}", lambda c=cls, r=rng: solve(rev, state, c(), steps=4, rng=r, check=False))  # type: ignore[misc]
    model = small_model(device=run.device)
    x = images(model, 4).to(run.device)
    quiet("likelihood, unchecked", lambda: log_likelihood(model.reverse(), x, steps=8, rng=[1, 2, 3, 4], check=False))
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=run.cuda)
    generator = torch.Generator().manual_seed(0)
    objective, data = DenoisingScoreMatching(model), model.decode(x)

    def step() -> None:
        optimizer.zero_grad()
        objective.loss(data, rng=generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    quiet("training step", step)


def capture(run: Run, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `work` after warm-up, as (replay, its output)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph.replay, out


def cuda_graphs(run: Run) -> None:
    """Whole runs captured once and replayed on other states, equal to the eager run."""
    if not run.only_cuda("capture"):
        return
    rev, x, draws = problem(run)
    cases = [(name, kind) for name in FIXED for kind in ("recorded", "range of seeds") if cls_draws(name, kind)]
    for name, kind in cases:

        def work(name: str = name, kind: str = kind) -> None:
            still = x.clone()

            def whole() -> Tensor:
                rng = Recorded(draws) if kind == "recorded" else [1, 2, 3, 4]
                return solve(rev, still, FIXED[name](), steps=4, rng=rng, check=False).x

            with torch.no_grad():
                replay, out = capture(run, whole)
                worst = 0.0
                for scale in (1.0, 0.5):
                    still.copy_(scale * x)
                    replay()
                    torch.cuda.synchronize()
                    worst = max(worst, relative(out.clone(), whole()))
            run.gate(f"{name}, {kind}", worst, 1e-12)

        run.do(f"{name}, {kind}", work)

    def network() -> None:
        model = model_of(FIRST, run)
        still, knot = images(model, 4).to(run.device), model.law.knot(0.5)
        with torch.no_grad(), precision(run, "bf16", cache=False):
            replay, out = capture(run, lambda: model.raw(still, knot))
            still.mul_(0.5)
            replay()
            torch.cuda.synchronize()
            run.gate(f"{FIRST}, bf16", relative(out.clone(), model.raw(still, knot)), BOUNDS["bf16"])

    run.do("network", network)
    try:  # last, for it is expected to fail: the generator is made at the first draw, unknown to the capture
        with torch.no_grad():
            capture(run, lambda: solve(rev, x, DDIM(eta=1.0), steps=2, rng=0, check=False).x)
        run.row("one seed for the batch", "text", captured=True)
    except RuntimeError as error:
        run.row("one seed for the batch", "text", captured=False, why=" ".join(str(error).split())[:200])


def cls_draws(name: str, kind: str) -> bool:
    """Whether a case is worth a capture: noise per sample only where there is noise."""
    return kind == "recorded" or FIXED[name]().stochastic


def compiled(run: Run) -> None:
    """torch.compile: the network, the model at any time, whole runs; graphs are counted."""
    backend = "inductor" if run.cuda else "eager"
    counters = torch._dynamo.utils.counters

    def graphs() -> int:
        return int(counters["stats"]["unique_graphs"])

    def network() -> None:
        torch._dynamo.reset()
        counters.clear()
        model = small_model(device=run.device)
        eager = copy.deepcopy(model)
        model.network.compile(backend=backend)
        worst = 0.0
        with torch.no_grad(), precision(run, "fp32"):
            for batch, t in ((4, 0.5), (4, 0.25), (4, 0.75), (6, 0.5), (8, 0.5)):
                x, knot = images(model, batch).to(run.device), model.law.knot(t)
                worst = max(worst, relative(model.raw(x, knot), eager.raw(x, knot)))
        run.gate("network", worst, BOUNDS["fp32"])
        run.gate("graphs of the network: one, and one for any batch", float(graphs()), 2.0)

    def any_time() -> None:
        torch._dynamo.reset()
        counters.clear()
        model = small_model(device=run.device)
        whole = torch.compile(model, backend=backend)
        x, worst = images(model, 4).to(run.device), 0.0
        with torch.no_grad(), precision(run, "fp32"):
            for t in (0.5, 0.25, 0.75, 0.125, 0.9):
                worst = max(worst, relative(whole(x, t).score, model(x, t).score))
        run.gate("model(x, t), t a number", worst, BOUNDS["fp32"])
        run.gate("graphs of model(x, t)", float(graphs()), 2.0)

    run.do("network", network)
    run.do("model(x, t), t a number", any_time)
    rev, x, _ = problem(run)
    for name in ("ddim", "heun", "dpmpp_3m", "sde_dpmpp_2m"):

        def whole(name: str = name) -> None:
            torch._dynamo.reset()

            def go(y: Tensor) -> Tensor:
                return solve(rev, y, FIXED[name](), steps=4, rng=[1, 2, 3, 4], check=False).x

            with torch.no_grad():
                out = torch.compile(go, fullgraph=True, backend=backend)(x)
                run.gate(f"whole run, {name}", relative(out, go(x)), EXACT)

        run.do(f"whole run, {name}", whole)

    def replayed() -> None:
        eager = small_model(device=run.device)

        def go(model: ScoreModel, solver: Solver) -> Tensor:
            return sample(model.reverse(), (4, 3, 8, 8), solver, steps=4, rng=[1, 2, 3, 4], device=run.device).x

        with precision(run, "fp32"):
            for solver in (DDIM(), Heun()):
                torch._dynamo.reset()
                model = small_model(device=run.device)
                model.network.compile(mode="reduce-overhead")
                name = f'mode="reduce-overhead", {type(solver).__name__}'
                try:
                    run.gate(name, relative(go(model, solver), go(eager, solver)), 1e-3)
                except RuntimeError as error:
                    # a graph's output is overwritten by its next replay; Heun reads two predictions at once
                    run.row(name, "text", refused=" ".join(str(error).split())[:200])

    if run.only_cuda('mode="reduce-overhead"'):
        run.do('mode="reduce-overhead"', replayed)


def training(run: Run) -> None:
    """Loss against the CPU, fused Adam, mixed precision with and without a scaler, a skipped step."""
    reference = small_model(torch.float64, "cpu")
    x = images(reference, 8, torch.float64)
    g = torch.Generator().manual_seed(6)
    t, noise = 0.1 + 0.8 * torch.rand(8, generator=g, dtype=torch.float64), torch.randn(x.shape, generator=g).double()

    def loss_of(model: ScoreModel) -> Tensor:
        like = next(model.parameters())
        y, eps = x.to(like), noise.to(like)
        return DenoisingScoreMatching(model).at_times(y, t.to(like.device), eps).mean()

    def losses(kind: str, fused: bool, steps: int) -> tuple[list[float], ScoreModel]:
        model = small_model(device=run.device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler(run.device.type, enabled=kind == "fp16" and run.cuda)
        values = []
        for _ in range(steps):
            optimizer.zero_grad()
            with precision(run, kind):
                loss = loss_of(model)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            values.append(float(loss.detach()))
        return values, model

    def first() -> None:
        with torch.no_grad(), precision(run, "fp32"):
            found = loss_of(small_model(device=run.device))
            run.gate("loss, fp32", relative(found, loss_of(reference)), BOUNDS["fp32"])

    def fused() -> None:
        ours = [losses("fp32", fused, 5)[0][-1] for fused in (True, False)]
        run.gate("fused Adam, loss after 5 steps", abs(ours[0] - ours[1]) / ours[1], 1e-3)

    def falls(kind: str) -> None:
        values, _ = losses(kind, run.cuda, 20)
        run.gate(f"{kind}: loss falls, last over first", values[-1] / values[0], 1.0, first=values[0], last=values[-1])

    def skipped() -> None:
        model = small_model(device=run.device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss_of(model)).backward()
        next(model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        moved = max(float((p - q).abs().max()) for p, q in zip(model.parameters(), before, strict=True))
        run.gate("a step with an infinite gradient is skipped", moved, 0.0)
        run.gate("and halves the scale", scaler.get_scale() / 2.0**9, 1.0)

    run.do("loss", first)
    if run.only_cuda("fused Adam, GradScaler"):
        run.do("fused Adam", fused)
        run.do("fp16 with GradScaler", lambda: falls("fp16"))
        run.do("skipped step", skipped)
    run.do("bf16", lambda: falls("bf16"))
