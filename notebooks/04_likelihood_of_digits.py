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
# # Likelihood of a trained model: bits/dim, bounds, typical sets, codes
#
# **Goal.** Train two small models of handwritten digits and ask what their likelihoods say: bits/dim with an error
# budget, the ODE against the variational bound, dequantizations compared, the effect of steps and probes; what is
# likely and what is typical; and that two networks find the same codes.
#
# **Runtime** about two minutes on a CPU. **Needs** `scoresde` with its training extra, and matplotlib.
#
# Every section ends by checking its own claim.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import scoresde
from scoresde import bits_per_dim, config, decode, elbo_of_data, encode, interpolate
from scoresde.likelihood.pictures import budget, convergence, histogram

torch.manual_seed(0)
torch.set_num_threads(1)
out = Path(tempfile.mkdtemp())


def show(path: Path, width: float = 9.0) -> None:
    picture = plt.imread(path)
    plt.figure(figsize=(width, width * picture.shape[0] / picture.shape[1]))
    plt.imshow(picture)
    plt.axis("off")
    plt.tight_layout(pad=0)
    plt.show()


def images(rows: torch.Tensor, names: list[str]) -> None:
    """Rows of digits, (rows, columns, 8, 8)."""
    _, axes = plt.subplots(*rows.shape[:2], figsize=(0.6 * rows.shape[1] + 1.5, 0.65 * rows.shape[0]))
    for line, row, name in zip(axes, rows, names, strict=True):
        for axis, image in zip(line, row, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=16)
            axis.set_axis_off()
        line[0].text(-0.3, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    plt.subplots_adjust(left=0.2, right=0.99, top=0.99, bottom=0.01)
    plt.show()


# %% [markdown]
# ## 1. Two models
#
# The same data and the same SDE; different sizes, seeds and parameterizations. Both are trained with the likelihood's
# own weighting.


# %%
def train(name: str, *options: str) -> scoresde.ScoreModel:
    base = ["training.max_seconds=0", "training.steps=220", "training.tensorboard=False", "training.eval_every=0"]
    settings = config.load("digits_vp", [f"--config.{option}" for option in (*base, *options)])
    scoresde.train(settings, out / name)
    return scoresde.load_model(out / name)


first = train("first")
second = train("second", "network.unet.channels=24", "model.parameterization=noise", "seed=1")
digits = config.make_data(config.load("digits_vp", []))
held_out = digits.held_out.data
spec = first.data_spec
print(f"{len(held_out)} held-out digits, {spec.levels} levels, {spec.dims} dimensions")

# %% [markdown]
# ## 2. Bits per dimension, and how far off they may be
#
# A row per sample can be kept in a CSV file (`path=`), where an interrupted run goes on.

# %%
some = held_out[:64]
scores = bits_per_dim(first, some, path=out / "scores.csv")
print(scores)
for cause, value in scores.systematic.items():
    print(f"  {cause:16s} {value:+.1e} bits/dim")
histogram(scores, out / "histogram.png")
show(out / "histogram.png", 7.0)
budget(scores, out / "budget.png")
show(out / "budget.png")

# %% [markdown]
# For a data set it is the number of samples that limits the figure, not the trace; for one sample it is the trace.

# %%
assert float(scores.trace_se.square().mean().sqrt()) > 3 * abs(scores.systematic["prior_mismatch"])
assert float(scores.trace_se.square().sum().sqrt()) / len(some) < scores.standard_error
sharp = bits_per_dim(first, some[:24], num_probes=16, doubling=False)
z = (scores.per_sample[:24] - sharp.per_sample) / (scores.trace_se[:24].square() + sharp.trace_se.square()).sqrt()
print(f"against eight times the probes: mean square of error / bar {float(z.square().mean()):.2f}")
assert 0.4 < float(z.square().mean()) < 2.5

# %% [markdown]
# ## 3. The ODE and the bound, and three ways to dequantize
#
# The variational bound of the reverse SDE is another model of the same data than the ODE, unless the score is exact.
# Importance weighting with several draws is tighter than the average of their logarithms. Noise that fills only a
# part of a bin leaves out the rest: the model was trained on uniformly dequantized data.

# %%
part = some[:32]
options = {"num_probes": 8, "steps": 24, "doubling": False}
figures = {
    "ODE, uniform, one draw": bits_per_dim(first, part, dequantization="uniform", **options).mean,
    "ODE, uniform, 4 draws": bits_per_dim(first, part, dequantization="uniform", samples=4, **options).mean,
    "ODE, uniform, 4 draws, iw": bits_per_dim(
        first, part, dequantization="uniform", samples=4, bound="iw", **options
    ).mean,
    "ODE, truncated normal": bits_per_dim(first, part, dequantization="truncated_normal", **options).mean,
    "variational bound": elbo_of_data(first, part, times=128).mean,
}
for name, value in figures.items():
    print(f"{name:28s} {value:.3f} bits/dim")
assert figures["ODE, uniform, 4 draws, iw"] < figures["ODE, uniform, 4 draws"]
assert figures["ODE, truncated normal"] > figures["ODE, uniform, one draw"] + 0.5

# %% [markdown]
# ## 4. Steps and probes
#
# Left: what more steps still change, on one kept probe, and what `doubling` reports. Right: the noise of the trace
# falls with the root of the number of probes, without solving again.

# %%
x = first.encode(some[:8])
steps, probes = (8, 16, 32, 64), (2, 4, 8, 16, 32)
settled = convergence(first.reverse(), x, steps, probes, sigma_data=first.sigma_data)
print(settled.table())
settled.plot(out / "convergence.png")
show(out / "convergence.png")
assert settled.discretization[2] < settled.discretization[0] / 10
assert abs(settled.trace_se[0] / settled.trace_se[-1] / 4 - 1) < 0.3

# %% [markdown]
# ## 5. Likely and typical
#
# Density is not typicality. A blank image has nearly the density of a digit, but its latent does not lie where draws
# from the prior do: the square of the norm of a typical latent is close to the number of dimensions. Inverted digits
# and pixel noise are far off by both.

# %%
blank = torch.zeros_like(some[:32])
noise = torch.randint(0, 17, some[:32].shape, generator=torch.Generator().manual_seed(0))
sets = {"digits": some[:32], "inverted": 16 - some[:32], "blank": blank, "pixel noise": noise}
options = {"dequantization": "uniform", "steps": 24, "doubling": False}
found = {name: bits_per_dim(first, data, **options) for name, data in sets.items()}
radius = {}
for name, data in sets.items():
    u = torch.rand(data.shape, generator=torch.Generator().manual_seed(1))
    radius[name] = encode(first.reverse(), first.encode(data, u), tol=1e-3).flatten(1).square().mean(1)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
for name in sets:
    left.hist(found[name].per_sample, bins=20, alpha=0.6, label=name)
    right.hist(radius[name], bins=20, alpha=0.6, label=name)
    print(f"{name:12s} {found[name].mean:6.2f} bits/dim, |z|^2 / D = {float(radius[name].mean()):.2f}")
left.set_xlabel("bits/dim")
right.set_xlabel("|z|^2 / D")
left.legend()
plt.tight_layout()
plt.show()
assert abs(found["blank"].mean - found["digits"].mean) < 1
assert min(found["inverted"].mean, found["pixel noise"].mean) > found["digits"].mean + 2
assert abs(float(radius["digits"].mean()) - 1) < 0.3 < float(radius["blank"].mean()) - 1

# %% [markdown]
# ## 6. Codes
#
# The latent is a code that depends on the scores alone: two networks that have learned the same data agree on it, in
# so far as they have learned it, and these have seen little. Between two codes, the great circle stays where the
# prior's mass is.

# %%
x = first.encode(some[:10])
codes = [encode(model.reverse(), x, tol=1e-4) for model in (first, second)]
flat = [code.flatten(1) for code in codes]
same = torch.nn.functional.cosine_similarity(flat[0], flat[1])
other = torch.nn.functional.cosine_similarity(flat[0], flat[1].roll(1, 0))
print(f"cosine between the codes of two models: same digit {same.mean():.3f}, another digit {other.mean():.3f}")
assert float(same.mean()) > 0.5 + float(other.mean()) and float(same.min()) > float(other.max())

back = decode(first.reverse(), codes[0], tol=1e-4)
across = decode(first.reverse(), codes[1], tol=1e-4)
images(
    torch.stack([some[:10, 0], *(first.decode(v)[:, 0] for v in (back, across))]),
    ["digit", "there and back", "code of the other model"],
)
print(f"there and back: {float((back - x).abs().max()):.1e}")
assert float((back - x).abs().max()) < 0.02

# %%
z = codes[0]
steps = torch.linspace(0, 1, 10)
rows = [interpolate(z[i].expand(10, 1, 8, 8), z[i + 1].expand(10, 1, 8, 8), steps) for i in range(4)]
between = [first.decode(decode(first.reverse(), row, tol=1e-3))[:, 0] for row in rows]
images(torch.stack(between), [""] * 4)
