# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Forward and reverse: an SDE, DDPM inside it, and the exact likelihood of a trained toy
#
# **Goal.** See data dissolve under the forward SDE and come back under its reverse; see that DDPM *is* the discretized
# variance-preserving case, on the very same noise; train a score model on a toy whose density is known, and compare
# its log-likelihood with the truth.
#
# **Runtime** about half a minute on a CPU. **Needs** `scoresde` and matplotlib.
# **Source** Song et al. 2021, [arXiv:2011.13456](https://arxiv.org/abs/2011.13456); Ho et al. 2020,
# [arXiv:2006.11239](https://arxiv.org/abs/2006.11239).
#
# Every section ends by checking its own claim.

# %%
import math
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

import scoresde
from scoresde import DDIM, MLP, VPSDE, Ancestral, EulerMaruyama, GaussianMixture, Heun, ScoreModel
from solvers import Recorded

plt.style.use("scoresde.scoresde")  # the look of the library's own pictures
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## 1. The forward SDE
#
# $dx = -\tfrac12\beta(t)\,x\,dt + \sqrt{\beta(t)}\,dw$ carries any data to $N(0, I)$. Our data are a mixture of three
# Gaussians on a line, so the noisy density $p_t$ is known at every time.

# %%
sde = VPSDE()
data = GaussianMixture(means=[[-1.6], [0.2], [1.3]], std=[0.15, 0.25, 0.1], weights=[0.3, 0.5, 0.2])

times = torch.linspace(sde.t_min, sde.t_max, 400, dtype=torch.float64)
paths = torch.empty(len(times), 60)
x = data.sample(60, dtype=torch.float64)[:, 0]
for i, (s, t) in enumerate(pairwise(times)):  # the exact transition kernel from one time to the next
    paths[i] = x
    kernel = sde.transition(float(s), float(t))
    x = kernel.scale * x + kernel.std * torch.randn_like(x)
paths[-1] = x

grid = torch.linspace(-3.5, 3.5, 300, dtype=torch.float64)[:, None]
density = torch.stack([data.log_prob(grid, sde.knot(float(t))).exp() for t in times[::8]], 1)
plt.figure(figsize=(8, 3))
plt.imshow(density.sqrt(), extent=(0, 1, -3.5, 3.5), origin="lower", aspect="auto", cmap="Blues")
plt.plot(times, paths[:, :12], lw=0.7, color="C1")
plt.grid(False), plt.xlabel("time t"), plt.ylabel("x (data units)")
plt.show()

# %% [markdown]
# Blue is the density $p_t$ (its square root, so that the tails are seen), orange are twelve paths.

# %% [markdown]
# The kernels compose: walking in 399 steps or jumping at once gives the same law.

# %%
walked = math.prod(sde.transition(float(s), float(t)).scale for s, t in pairwise(times))
jump = sde.transition(sde.t_min, sde.t_max)
print(f"scale of the walk {walked:.12f}, of the jump {jump.scale:.12f}")
assert abs(walked - jump.scale) < 1e-12

# %% [markdown]
# ## 2. The reverse
#
# With the score $\nabla\log p_t$ the process runs backward, as an SDE or as the deterministic probability-flow ODE.
# `data.reverse(sde)` is the exact reverse. Solvers plug into it; all of them below start from the same prior draw, and
# take their steps on the grid that is named, or on the default one, `Blended`, which crowds them where the data appear.

# %%
rev = data.reverse(sde)
runs = {
    "Euler-Maruyama": (EulerMaruyama(), {"steps": 400}),
    "DDIM (eta = 1)": (DDIM(eta=1.0), {"steps": 400}),
    "DDIM (ODE)": (DDIM(), {"steps": 100}),
    "Heun (ODE)": (Heun(), {"steps": 40, "grid": "karras"}),
}
figure, axes = plt.subplots(1, len(runs), figsize=(11, 2.4), sharey=True)
truth = data.log_prob(grid).exp()
for axis, (name, (solver, options)) in zip(axes, runs.items(), strict=True):
    samples = scoresde.sample(rev, (20_000, 1), solver, rng=1, **options)
    axis.hist(samples.x[:, 0], bins=120, range=(-3, 3), density=True, color="C1")
    axis.plot(grid, truth, "k", lw=0.8)
    axis.set_xlabel(f"x after {name},\n{int(samples.nfe[0])} calls")
    # the weights of the modes, with their binomial standard error
    share = float((samples.x < -0.8).float().mean())
    error = math.sqrt(0.3 * 0.7 / 20_000)
    assert abs(share - 0.3) < 4 * error + 0.01, (name, share)
axes[0].set_ylabel("density")
plt.show()

# %% [markdown]
# ## 3. DDPM is the discretized VP case
#
# `VPSDE().discretize(1000)` is DDPM's chain: its $\beta_i$ are linear from 1e-4 to 0.02, and its ancestral step is
# Algorithm 2 of Ho et al. We send the same prior draw and the **same noise** through that chain and through
# Euler-Maruyama on the reverse SDE at the chain's own times. The two are different formulas; they follow each other
# path by path, closer the finer the chain. (The mean absolute difference falls like 1 / n. The root mean square falls
# only like its root, for it is ruled by the rare paths that the two formulas send to different modes.)

# %%
def side_by_side(n, batch=4000):
    chain = sde.discretize(n)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(batch, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n - 1, batch, 1, generator=generator, dtype=torch.float64)
    knots = chain.descend()[:-1]  # stop at level 0
    ddpm = scoresde.solve(
        data.reverse(chain), x_T, Ancestral("large"), grid=knots, rng=Recorded(noise), trajectory=True
    )
    sde_times = [k.t for k in knots]
    fine = VPSDE(t_min=sde_times[-1])
    em = scoresde.solve(
        data.reverse(fine), x_T, EulerMaruyama(), grid=sde_times, rng=Recorded(noise), trajectory=True
    )
    return chain, sde_times, ddpm, em

chain, sde_times, ddpm, em = side_by_side(1000)
print("betas:", chain.betas[0].item(), "...", chain.betas[-1].item())
plt.figure(figsize=(8, 3))
ours = plt.plot(sde_times, ddpm.trajectory[:, :8, 0], lw=1.6, color="C0", alpha=0.6)
theirs = plt.plot(sde_times, em.trajectory[:, :8, 0], lw=0.6, color="k")
plt.gca().invert_xaxis(), plt.xlabel("time t"), plt.ylabel("x (data units)")
plt.legend([ours[0], theirs[0]], ["DDPM, 1000 steps", "Euler-Maruyama on the same noise"])
plt.show()

differences = {}
for n in (250, 1000, 4000):
    _, _, a, b = side_by_side(n)
    differences[n] = float((a.x - b.x).abs().mean())
    print(f"n = {n:5d}: mean difference {differences[n]:.5f}")
rate = math.log(differences[250] / differences[4000]) / math.log(16)
print(f"observed rate in 1/n: {rate:.2f}")
assert abs(float(chain.betas[0]) - 1e-4) < 1e-12 and abs(float(chain.betas[-1]) - 0.02) < 1e-12
assert rate > 0.85 and differences[1000] < 0.02

# %% [markdown]
# ## 4. A trained toy and its log-likelihood
#
# A small network learns the score of a two-dimensional mixture by denoising score matching. Its probability-flow ODE
# has a density that `log_likelihood` computes exactly (here with the exact trace); the truth is the mixture's own
# noisy density at `t_min`.

# %%
toy = GaussianMixture(
    means=[[math.cos(a) * 0.9, math.sin(a) * 0.9] for a in torch.arange(5) * 2 * math.pi / 5], std=0.2
)
model = ScoreModel(
    MLP((2,), width=96, depth=3, embedding="fourier", fourier_scale=0.3),
    VPSDE(),
    parameterization="v",
    noise_level="half_log_snr",
    sigma_data=0.7,
)
objective = scoresde.DenoisingScoreMatching(model, times="importance", weighting="likelihood")
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
steps, losses = 2500, []
generator = torch.Generator().manual_seed(0)
model.train()
for step in range(steps):
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * (1 - step / steps)
    loss = objective.loss(toy.sample(512, generator), rng=generator)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss: first 100 steps {sum(losses[:100]) / 100:.3f}, last 100 steps {sum(losses[-100:]) / 100:.3f}")

# %%
held_out = toy.sample(1000, torch.Generator().manual_seed(7))
result = scoresde.log_likelihood(model.reverse(), held_out, divergence="exact", sigma_data=0.7)
knot = model.law.knot(model.law.t_min)
exact = toy.log_prob(held_out.double(), knot)
gap = exact - result.log_prob
print(f"mean log p, model {result.log_prob.mean():.4f}, truth {exact.mean():.4f} nats")
print(f"gap (an estimate of the KL divergence): {gap.mean():.4f} +- {gap.std() / math.sqrt(len(gap)):.4f} nats")
print(f"network evaluations per sample: {result.nfe.float().mean():.0f}")

side = torch.linspace(-1.8, 1.8, 60)
points = torch.cartesian_prod(side, side)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
learned = scoresde.log_likelihood(model.reverse(), points, divergence="exact", sigma_data=0.7)
panels = {"truth": toy.log_prob(points.double(), knot), "model, by the ODE": learned.log_prob}
for axis, (name, log_p) in zip(axes[:2], panels.items(), strict=True):
    axis.imshow(log_p.exp().reshape(60, 60).T, origin="lower", extent=(-1.8, 1.8, -1.8, 1.8), cmap="Blues")
    axis.grid(False), axis.set_xlabel(f"$x_1$; density: {name}"), axis.set_ylabel("$x_2$")
axes[2].scatter(exact, result.log_prob, s=3)
axes[2].plot([-6, 0], [-6, 0], "k", lw=0.6)
axes[2].set_xlabel("exact log p (nats)"), axes[2].set_ylabel("the model's log p (nats)")
plt.show()

cell = float(side[1] - side[0]) ** 2
total = float((learned.log_prob.exp() * cell).sum())
print(f"the model's density sums to {total:.4f} over the square")
assert abs(total - 1.0) < 0.02  # a density, whatever the network has learned
assert -0.005 < float(gap.mean()) < 0.1  # and close to the truth

# %% [markdown]
# ## Where to go next
#
# `scoresde demo` does all of this on handwritten digits; `docs/architecture.md` says how the packages fit.
