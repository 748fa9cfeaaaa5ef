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
# # Likelihood from the ground up: every error bar against the truth
#
# **Goal.** Compute log p through the probability-flow ODE where the true density is known, and see what each part of
# the error bar stands for, the trace estimator and the discretisation, and what the two biases are, the truncation at
# the smallest noise level and the prior. Then integers: dequantization, codecs, and bounds.
#
# **Runtime** about half a minute on a CPU. **Needs** `scoresde` and matplotlib.
#
# Every section ends by checking its own claim.

# %%
import math

import matplotlib.pyplot as plt
import torch

from scoresde import (
    PCA,
    VPSDE,
    Affine,
    ClassifierFreeGuidance,
    DataSpec,
    GaussianMixture,
    ScoreModel,
    bits_per_dim,
    decode,
    elbo,
    encode,
    log_likelihood,
)
from solvers import AdaptiveRungeKutta, solve

torch.manual_seed(0)
torch.set_num_threads(1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 1. The change of variables
#
# The probability-flow ODE carries x to a latent z at t_max, and
#
# $$\log p_{t_{min}}(x) = \log \pi(z) + \int \nabla\cdot\dot x\, dt.$$
#
# A mixture on the line: the flow pushes the density together and apart, and the divergence keeps the books.

# %%
line = GaussianMixture([[-1.0], [0.2], [1.1]], std=[0.15, 0.3, 0.1], weights=[0.3, 0.5, 0.2])
sde = VPSDE()
rev = line.reverse(sde)
x = torch.linspace(-1.6, 1.6, 121, dtype=torch.float64)[:, None]
result = log_likelihood(rev, x)
exact = line.log_prob(x, sde.knot(sde.t_min))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
left.plot(x, exact.exp(), label="exact, at t_min")
left.plot(x[::4], result.log_prob[::4].exp(), ".", label="through the ODE")
left.set_xlabel("x")
left.legend()
times = torch.linspace(sde.t_min, 1.0, 60).tolist()
for start in torch.linspace(-1.5, 1.5, 25, dtype=torch.float64):
    path = solve(rev, start.reshape(1, 1), AdaptiveRungeKutta(), grid=times, trajectory=True).trajectory[:, 0, 0]
    right.plot(times, path, color="C0", linewidth=0.7)
right.set_xlabel("t")
right.set_title("the flow from data to prior", fontsize=10)
plt.tight_layout()
plt.show()
print(f"largest error {float((result.log_prob - exact).abs().max()):.1e} nats, {int(result.nfe.max())} calls")
assert ((result.log_prob + result.prior_mismatch - exact).abs() < 3 * result.discretization + 1e-3).all()

# %% [markdown]
# ## 2. The trace estimator
#
# In high dimensions the exact divergence costs one product per dimension. Hutchinson's estimator costs one per probe,
# and is noisy. Here is a Gaussian in 48 dimensions with variances from 0.001 to 9. One probe kept along the path is
# what is usual; fresh ones at every knot are independent, and their noise averages out. Both report their standard
# error, from how the shares of the elements of x in the estimates scatter; it has to be right. Kept probes need six for
# that: fewer may agree by chance, and nothing along the path would tell.

# %%
q, _ = torch.linalg.qr(torch.randn(48, 48, generator=generator(0), dtype=torch.float64))
spread = torch.logspace(-3, math.log10(9.0), 48, dtype=torch.float64)
wide = GaussianMixture(torch.zeros(1, 48), covariances=((q * spread) @ q.T)[None])
rev = wide.reverse(sde)
point = wide.sample(1, generator(1), torch.float64)
truth = log_likelihood(rev, point, steps=32, divergence="exact").log_prob
many, seeds = point.expand(200, -1), list(range(200))
kept = log_likelihood(rev, many, tol=1e-2, divergence="hutchinson", num_probes=6, rng=seeds)
fresh = log_likelihood(rev, many, steps=32, divergence="hutchinson", num_probes=6, rng=seeds)

figure, axis = plt.subplots(figsize=(8, 3.2))
for found, label in ((kept, "six kept probes"), (fresh, "six fresh probes per knot")):
    axis.hist((found.log_prob - truth).numpy(), bins=40, alpha=0.6, label=f"{label}: std {found.log_prob.std():.2f}")
axis.axvline(0, color="k", linewidth=0.8)
axis.set_xlabel("error of log p over 200 seeds, nats")
axis.legend()
plt.tight_layout()
plt.show()
for name, found in (("kept", kept), ("fresh", fresh)):
    error = found.log_prob - truth
    inside = (error.abs() < found.trace_bar(0.9)).double().mean()
    reported = found.trace_se.square().mean().sqrt()
    print(f"{name:6s} spread {error.std():.2f}, reported {reported:.2f}, 90 % bars cover {100 * inside:.0f} %")
    assert abs(float(inside) - 0.9) < 3 * math.sqrt(0.09 / 200)
assert fresh.log_prob.std() < kept.log_prob.std() / 1.8

# %% [markdown]
# A result with fixed steps remembers its trajectory: `refine` adds probes without solving again, a number of them or as
# many as a standard error takes. In the second case the first four decide how many that is and are left out of the
# result: probes that decide when to stop are the ones that happen to agree, and their mean is biased.

# %%
finer = fresh.refine(num_probes=18)
sharp = fresh.refine(target_se=0.5)
print(f"standard error {fresh.trace_se.mean():.2f} -> {finer.trace_se.mean():.2f} and {sharp.trace_se.mean():.2f} nats")
assert abs(float(finer.trace_se.square().mean() / fresh.trace_se.square().mean()) - 6 / 24) < 0.03
error = sharp.log_prob - truth
assert abs(float(error.mean())) < 3 * float(error.std()) / math.sqrt(200)
assert float(error.square().mean().sqrt()) < 0.57

# %% [markdown]
# ## 3. The discretisation
#
# Halving the number of steps says how much steps matter. The reported figure is the difference between N and N / 2
# steps: an honest estimate of the error at N / 2, and a bar for the result at N.

# %%
blobs = GaussianMixture(torch.randn(6, 8, generator=generator(4)), std=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
rev = blobs.reverse(sde)
x = blobs.sample(200, generator(1), torch.float64)
exact = blobs.log_prob(x, sde.knot(sde.t_min))
terminal = {"prior": lambda z: blobs.log_prob(z, sde.knot(sde.t_max))}
counts = (8, 12, 16, 24, 32, 48, 64, 96)
errors, bars, covered = [], [], []
for steps in counts:
    found = log_likelihood(rev, x, steps=steps, divergence="exact", **terminal)
    error = (found.log_prob - exact).abs()
    errors.append(float(error.median()))
    bars.append(float(found.discretization.median()))
    covered.append(float((error <= 3 * found.discretization).double().mean()))
figure, axis = plt.subplots(figsize=(6, 3.4))
axis.loglog(counts, errors, "o-", label="error (median)")
axis.loglog(counts, bars, "s--", label="reported")
axis.set_xlabel("steps")
axis.set_ylabel("nats")
axis.legend()
plt.tight_layout()
plt.show()
print("three times the reported figure covers", [f"{100 * c:.0f} %" for c in covered])
assert min(covered) > 0.97 - 3 * math.sqrt(0.03 * 0.97 / 200)
assert errors[-1] < errors[1] / 100

# %% [markdown]
# ## 4. Truncation and prior
#
# The ODE gives the density at t_min, not that of the data. The heat equation says how they differ to first order; the
# model knows all it takes. Likewise at the other end: the law at t_max is not quite the prior.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for half_log_snr, colour in ((3.0, "C0"), (4.0, "C1"), (5.0, "C2")):
    law = VPSDE(t_min=sde.time_at(half_log_snr))
    found = log_likelihood(blobs.reverse(law), x[:80], prior=terminal["prior"])
    known = blobs.log_prob(x[:80]) - blobs.log_prob(x[:80], law.knot(law.t_min))
    left.plot(known, found.truncation, ".", color=colour, label=f"sigma = {float(law.sigma(law.t_min)):.3f}")
    remainder = float((known - found.truncation).abs().median() / known.abs().median())
    print(f"sigma(t_min) = {float(law.sigma(law.t_min)):.3f}: {100 * remainder:.1f} % of the difference is left")
low, high = left.get_xlim()
left.plot([low, high], [low, high], color="k", linewidth=0.6)
left.set_xlabel("log p_0 - log p at t_min, exact")
left.set_ylabel("reported truncation")
left.legend()
assert remainder < 0.05

found = log_likelihood(rev, x[:80], tol=1e-4)
known = blobs.log_prob(found.latent, sde.knot(sde.t_max)) - sde.prior_logp(found.latent)
right.plot(known, found.prior_mismatch, ".")
right.plot(known, known, color="k", linewidth=0.6)
right.set_xlabel("log p_T - log prior, exact")
right.set_ylabel("reported prior mismatch")
plt.tight_layout()
plt.show()
assert float((known - found.prior_mismatch).abs().max()) < 0.01 * float(known.abs().max())

# %% [markdown]
# ## 5. One bar for everything
#
# With both biases corrected, `Likelihood.error` is a bar for the density at t = 0: the noise of the trace, the
# discretisation and what the corrections may leave. Against the true density of the data, sample by sample:

# %%
found = log_likelihood(rev, x, steps=32, divergence="hutchinson", num_probes=8, correct=["truncation", "prior"], rng=0)
error = found.log_prob - blobs.log_prob(x)
bar = found.error(0.95)
order = blobs.log_prob(x).argsort()
figure, axis = plt.subplots(figsize=(10, 3.0))
axis.errorbar(range(200), error[order], yerr=bar[order], fmt=".", markersize=3, elinewidth=0.7)
axis.axhline(0, color="k", linewidth=0.6)
axis.set_xlabel("sample")
axis.set_ylabel("log p - exact, nats")
plt.tight_layout()
plt.show()
inside = float((error.abs() < bar).double().mean())
print(f"the 95 % bar covers {100 * inside:.1f} %")
assert inside > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 200)

# %% [markdown]
# ## 6. Integers: dequantization and bounds
#
# A law on 16 levels. A density gives every bin a probability; evaluating it at one random point of the bin, on average
# of the logarithm, bounds -log2 P from above. More points, weighted by importance, close the gap.


# %%
class Exact(torch.nn.Module):
    """A network that knows the score."""

    def forward(self, x, noise_level):
        return line.reverse(sde)(x, sde.knot(noise_level, ndim=x.ndim)).v


spec = DataSpec((1,), 16)
model = ScoreModel(Exact(), sde, "v", "time", spec, sigma_data=1.0, input_scaling="none").double()
levels = torch.arange(16)[:, None]
knot = sde.knot(sde.t_min)
u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
inner = model.codec.encode(levels.double() + u)  # [-1, 1) in 16 bins
log_p = line.log_prob(knot.alpha * inner.reshape(-1, 1), knot).reshape(16, -1)
log_p += math.log(knot.alpha) + model.codec.log_volume
exact_bits = -(torch.logsumexp(log_p, 1) - math.log(2000)) / math.log(2)

bounds = {"one draw": {"samples": 1}, "64 draws, elbo": {"samples": 64}, "64 draws, iw": {"samples": 64, "bound": "iw"}}
figure, axis = plt.subplots(figsize=(8, 3.2))
axis.bar(range(16), exact_bits, color="0.8", label="exact")
for (name, options), marker in zip(bounds.items(), "x_o", strict=True):
    found = bits_per_dim(model, levels, dequantization="uniform", **options)
    axis.plot(range(16), found.per_sample, marker, label=name, fillstyle="none")
    print(f"{name:16s} mean gap {float((found.per_sample - exact_bits).mean()):+.3f} bits")
axis.set_xlabel("level")
axis.set_ylabel("-log2 P")
axis.legend()
plt.tight_layout()
plt.show()
assert float((found.per_sample - exact_bits).abs().median()) < 0.05

# %% [markdown]
# ## 7. A codec turns the state, not the figure
#
# A model need not work on data as they are. Under a codec x = c(z) that is a bijection
#
# $$\log p(z) = \log p(x) + \log\left|\det \frac{dx}{dz}\right|,$$
#
# and for principal axes or wavelets, a rotation and one scale, the determinant is a constant: bits per dimension stay
# exact, and dequantization by uniform numbers in data units does too. Pairs of integers along a diagonal, and the same
# law under both codecs:

# %%
pair = DataSpec((2,), 16)
means = torch.tensor([[6.0, 6.0], [10.0, 9.0]], dtype=torch.float64)
covariances = torch.tensor([[[2.0, 1.2], [1.2, 2.0]], [[1.5, 1.0], [1.0, 2.5]]], dtype=torch.float64)
law_of_pairs = GaussianMixture(means, covariances=covariances)
pairs = law_of_pairs.sample(400, generator(5), torch.float64).floor().clamp(0, 15).long()
pca = PCA.fit(pair, pairs)
straight = Affine((2,), shift=pca.mean.tolist(), scale=float(pca.scales(pca.mean)[0]))
codecs = {"shift and scale": straight, "principal axes": pca}


def exact_model(codec) -> ScoreModel:
    """The score of what a linear codec makes of the law of pairs."""
    zero, *units = codec.encode(torch.cat([torch.zeros(1, 2), torch.eye(2)]).double())
    turn = torch.stack(units, 1) - zero[:, None]
    states = GaussianMixture(codec.encode(means), covariances=turn @ covariances @ turn.T)

    class Score(torch.nn.Module):
        def forward(self, x, noise_level):
            return states.reverse(sde)(x, sde.knot(noise_level, ndim=x.ndim)).v

    return ScoreModel(Score(), sde, "v", "time", pair, sigma_data=1.0, input_scaling="none", codec=codec).double()


figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
scored = {}
for axis, (name, codec) in zip(axes, codecs.items(), strict=True):
    u = torch.rand(pairs.shape, generator=generator(6))
    axis.plot(*codec.encode(pairs + u).T, ".", markersize=3)
    axis.set_title(f"states by {name}")
    axis.set_aspect("equal")
    scored[name] = bits_per_dim(exact_model(codec), pairs[:100], dequantization="uniform", tol=1e-5)
    print(f"{name:16s} {scored[name].mean:.5f} bits/dim")
plt.tight_layout()
plt.show()
first, second = scored.values()
assert float((first.per_sample - second.per_sample).abs().max()) < 1e-5

# %% [markdown]
# ## 8. What has no likelihood
#
# A guided field pulls samples towards a condition harder than any density's score does: it is the score of no law p_t,
# and a number computed from it would be the likelihood of nothing. It is refused, however deep in wrappers it is, and
# so are maps from noise to data, such as consistency models. Guidance by w = 0 or 1 is a model again.

# %%
told = sde.reverse(score=lambda v, t, shift=0.0: blobs.reverse(sde)(v - shift, t).score, condition={"shift": 0.0})
for weight in (1.0, 2.0):
    guided = ClassifierFreeGuidance(told, weight, null={"shift": 0.1})
    try:
        print(f"w = {weight}: log p = {float(log_likelihood(guided, x[:1]).log_prob):.3f}")
    except ValueError as refusal:
        print(f"w = {weight}: {refusal}")

# %% [markdown]
# ## 9. The variational bound, and codes
#
# For an exact score the evidence lower bound is no bound any more but the likelihood itself, by another road: noise and
# denoise, at random times. And the latent of the ODE is a code: decoding it gives the sample back.

# %%
bound = elbo(rev, x[:40], times=2048, rng=0)
gap = bound.nats + blobs.log_prob(x[:40])
print(f"elbo - exact: mean {gap.mean():+.3f} nats, standard error of one {bound.standard_error.mean():.3f}")
assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(40) + 0.02
back = decode(rev, encode(rev, x[:40], tol=1e-8), tol=1e-8)
print(f"encode and decode: {float((back - x[:40]).abs().max()):.1e}")
assert float((back - x[:40]).abs().max()) < 1e-5
