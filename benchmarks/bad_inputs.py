"""What the public API and the command line make of bad input: a sentence, silence, a bare traceback, or a hang.

    python benchmarks/bad_inputs.py [--all] [--only=TEXT] [--seconds=10]

Every line of `CASES` is one call with something wrong in it; a line that begins with $ is a command line. Each is run
with a limit of time, in a child process that is replaced when it hangs or dies, and counted as

* refused: an exception that our own code raised on purpose (by `raise`), with a message of one sentence at least (of
  those that the command line turns into one line, if it was one); or Python's own words for an argument that does not
  exist;
* warned: it went on and a warning said what is wrong;
* accepted: it went on in silence. Not always a defect: what a line asks for may be unusual and still make sense;
* bare: an exception from inside, of torch, NumPy or an operator, or one that says nothing;
* hang: longer than the limit, or the process died.

Needs this repository's packages only. Half a minute; another version is judged with PYTHONPATH=its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dis
import io
import json
import math
import os
import select
import shlex
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scoresde
import sde_lib
import solvers
from scoresde import config as configs

KINDS = ("refused", "warned", "accepted", "bare", "hang")

CASES = """
# sdes
VPSDE(beta_min=-0.1)
VPSDE(beta_max=nan)
VPSDE(beta_min=20.0, beta_max=0.1)
VPSDE(beta_max="20")
VPSDE(beta_max=None)
VPSDE(t_min=0.0)
VPSDE(t_min=2.0)
VPSDE(t_min=inf)
VPSDE(beta_maximum=20.0)
VPSDE(beta_max=1e300)
SubVPSDE(beta_max=0.0)
VESDE(sigma_min=0.0)
VESDE(sigma_min=60.0, sigma_max=50.0)
VESDE(sigma_max=inf)
VESDE(sigma_max=torch.ones(2))
VESDE(sigma_min=[0.01])
CosineVPSDE(s=-1.0)
CosineVPSDE(t_min=1.5)
EDMSDE(sigma_min=-0.002)
EDMSDE(sigma_max=nan)
FlowSDE(t_min=0.0)
FlowSDE(t_min=1.0)
FlowSDE(t_min="0.1")
TabulatedSDE([])
TabulatedSDE([0.9])
TabulatedSDE([0.9, 0.95, 0.5])
TabulatedSDE([0.9, nan, 0.5])
TabulatedSDE([1.1, 0.9, 0.5])
TabulatedSDE("0.9, 0.5")
TabulatedSDE([0.9, -0.1])
sde.alpha("0.5")
sde.alpha(None)
sde.knot(2.0)
sde.knot(nan)
sde.knot("0.5")
sde.knot(torch.tensor([nan, 0.5]), ndim=2)
sde.knot(torch.ones(2, 2), ndim=2)
sde.time_at(nan)
sde.time_at(inf)
sde.time_at("0")
sde.discretize(0)
sde.discretize(1)
sde.discretize(-5)
sde.discretize(2.5)
sde.discretize("1000")
sde.discretize(None)
sde.discretize(10**12)
chain.knot(50)
chain.knot(-1)
chain.knot(0.5)
chain.knot("3")
chain.knot(torch.tensor([0, 99]), ndim=2)
chain.knot(torch.tensor([0.5, 1.5]), ndim=2)
chain.descend(0)
chain.descend(51)
chain.descend("10")
chain.g2(0.5)
chain.drift(x, 3)
Chain([0.9, 0.5], [0.1])
Chain([1.0, 0.5], [0.1, nan])
Chain("a", "b")

# reverses
sde.reverse()
sde.reverse(score=None)
sde.reverse(score=3)
sde.reverse(score=lambda x, t: -x, noise=lambda x, t: x)
sde.reverse(scores=lambda x, t: -x)
sde.reverse(edm=lambda x, t: x, sigma_data=0.0)
sde.reverse(edm=lambda x, t: x, sigma_data=nan)
sde.reverse(edm=lambda x, t: x, sigma_data="0.5")
sde.reverse(score=lambda x, t: -x, class_label=torch.zeros(3))
sde.reverse(lambda x, t: -x)
rev(x, 2.0)
rev(x, nan)
rev(x, "0.5")
rev(x, None)
rev(x, torch.tensor([0.1, 0.2]))
rev(x, torch.tensor([0.1, nan, 0.2]))
rev(x.tolist(), 0.5)
rev(None, 0.5)
rev(x.long(), 0.5)
sde.reverse(score=lambda x, t: None)(x, 0.5).score
sde.reverse(score=lambda x, t: x[:1])(x, 0.5).data
sde.reverse(score=lambda x, t: x.sum())(x, 0.5).data
sde.reverse(score=lambda x, t: x.tolist())(x, 0.5).data
sde.reverse(score=lambda x, t: x.mul_(-1.0))(x.clone(), 0.5).data
sample(sde.reverse(score=lambda x: -x), (3, 2), Heun(), steps=4)
sample(sde.reverse(score=lambda x, t: torch.nn.Embedding(20, 2)(t)), (3, 2), DDIM(), steps=4)
sample(sde.reverse(score=lambda x, t, y: -x), (3, 2), DDIM(), steps=4)
sample(sde.reverse(score=lambda x, t: nan * x), (3, 2), DDIM(), steps=4)
sample(sde.reverse(score=lambda x, t: nan * x), (3, 2), DDIM(), steps=4, strict=True)
sample(sde.reverse(score=lambda x, t: 1e30 * x), (3, 2), Heun(), steps=8)
GaussianMixture([])
GaussianMixture([[nan, 0.0]], std=0.1)
GaussianMixture([[0.0, 0.0]], std=-0.1)
GaussianMixture([[0.0, 0.0]], std=[0.1, 0.2])
GaussianMixture([[0.0, 0.0], [1.0]], std=0.1)
GaussianMixture("means", std=0.1)
GaussianMixture([[0.0, 0.0]], std=0.1, weights=[-1.0])
GaussianMixture([[0.0], [1.0]], std=0.1, weights=[0.2])
GaussianMixture([[0.0, 0.0]], std=0.1).sample(-1)
GaussianMixture([[0.0, 0.0]], std=0.1).sample("3")
GaussianMixture([[0.0, 0.0]], std=0.1).log_prob(torch.zeros(3, 5))
GaussianMixture([[0.0, 0.0]], std=0.1).log_prob([[0.0, 0.0]])

# sampling
sample(rev, (3, 2), Heun)
sample(rev, (3, 2), "huen", steps=4)
sample(rev, (3, 2), None, steps=4)
sample(rev, (3, 2), 7, steps=4)
sample(None, (3, 2), Heun(), steps=4)
sample(model, (3, 2), Heun(), steps=4)
sample(lambda x, t: x, (3, 2), Heun(), steps=4)
sample(rev, (3, 2), Heun())
sample(rev, (3, 2), Heun(), steps=0)
sample(rev, (3, 2), Heun(), steps=-1)
sample(rev, (3, 2), Heun(), steps=2.5)
sample(rev, (3, 2), Heun(), steps="4")
sample(rev, (3, 2), Heun(), steps=nan)
sample(rev, (3, 2), Heun(), steps=True)
sample(rev, (3, 2), Heun(), steps=4, nfe=8)
sample(rev, (3, 2), Heun(), nfe=0)
sample(rev, (3, 2), Heun(), nfe=-3)
sample(rev, (3, 2), Heun(), nfe=1)
sample(rev, (3, 2), Heun(), nfe=7.5)
sample(rev, (3, 2), Heun(), nfe="20")
sample(rev, (3, 2), RK4(), nfe=3)
sample(rev, (), Heun(), steps=4)
sample(rev, (0, 2), Heun(), steps=4)
sample(rev, (-3, 2), Heun(), steps=4)
sample(rev, (3.0, 2), Heun(), steps=4)
sample(rev, 3, Heun(), steps=4)
sample(rev, "32", Heun(), steps=4)
sample(rev, None, Heun(), steps=4)
sample(rev, (3, 5), Heun(), steps=4)
sample(rev, (3, 2), Heun(), steps=4, grid="karas")
sample(rev, (3, 2), Heun(), steps=4, grid=7)
sample(rev, (3, 2), Heun(), grid=[])
sample(rev, (3, 2), Heun(), grid=[1.0])
sample(rev, (3, 2), Heun(), grid=[1.0, 0.5, 0.7])
sample(rev, (3, 2), Heun(), grid=[1.0, nan, 0.01])
sample(rev, (3, 2), Heun(), grid=[1.0, 0.5, 0.0])
sample(rev, (3, 2), Heun(), grid=[2.0, 0.5, 0.1])
sample(rev, (3, 2), Heun(), grid=[0.5, 0.1])
sample(rev, (3, 2), Heun(), grid=["a", "b"])
sample(rev, (3, 2), Heun(), grid=[1.0, 0.5], steps=4)
sample(rev, (3, 2), Heun(), grid=torch.ones(2, 2))
sample(rev, (3, 2), Ancestral(), steps=4, grid=VESDE().discretize(50))
sample(rev, (3, 2), Heun(), steps=4, grid=UniformTime(t_start=5.0))
sample(rev, (3, 2), Heun(), steps=4, grid=UniformTime(t_start=0.5, t_end=0.5))
sample(rev, (3, 2), Heun(), steps=4, grid=Karras(rho=0.0))
sample(rev, (3, 2), Heun(), steps=4, grid=Blended(mix=2.0))
sample(rev, (3, 2), Heun(), steps=4, grid=UniformAngle(sigma_data=-1.0))
sample(rev, (3, 2), Heun(), steps=4, end="stopp")
sample(rev, (3, 2), Heun(), steps=4, end=None)
sample(rev, (3, 2), Heun(), steps=4, rng=1.5)
sample(rev, (3, 2), Heun(), steps=4, rng="seed")
sample(rev, (3, 2), Heun(), steps=4, rng=[1, 2])
sample(rev, (3, 2), Heun(), steps=4, rng=[1, 2, "a"])
sample(rev, (3, 2), Heun(), steps=4, rng=10**30)
sample(rev, (3, 2), Heun(), steps=4, rng=np.random.default_rng(0))
sample(rev, (3, 2), Heun(), steps=4, dtype=torch.int64)
sample(rev, (3, 2), Heun(), steps=4, dtype="float32")
sample(rev, (3, 2), Heun(), steps=4, dtype=torch.complex64)
sample(rev, (3, 2), Heun(), steps=4, device="gpu")
sample(rev, (3, 2), Heun(), steps=4, device="cuda:99")
sample(rev, (3, 2), Heun(), steps=4, device="meta")
sample(rev, (3, 2), Heun(), steps=4, condition=5)
sample(rev, (3, 2), Heun(), steps=4, condition={"y": torch.zeros(3)})
sample(rev, (3, 2), Heun(), steps=4, project=3)
sample(rev, (3, 2), Heun(), steps=4, project=lambda x, knot, draw: None)
sample(rev, (3, 2), Heun(), steps=4, project=lambda x: x)
sample(rev, (3, 2), Heun(), steps=4, callback=3)
sample(rev, (3, 2), Heun(), steps=4, strict=True, check=False)
sample(rev, (3, 2), Heun(), step=4)
sample(revc, (3, 2), RK4(), steps=4)
sample(revc, (3, 2), Ancestral(), steps=400)
sample(revc, (3, 2), Ancestral(), grid="karras", steps=4)
sample(revc, (3, 2), AdaptiveRungeKutta())
sample(revc, (3, 2), EulerMaruyama(), steps=4)
sample(revc, (3, 2), TorchDiffEq())
sample(revc, (3, 2), SciPyODE())
solve(rev, x.tolist(), Heun(), steps=4)
solve(rev, x.long(), Heun(), steps=4)
solve(rev, x[:0], Heun(), steps=4)
solve(rev, torch.tensor(1.0), Heun(), steps=4)
solve(rev, nan * x, Heun(), steps=4)
solve(rev, x + inf, AdaptiveRungeKutta())
solve(rev, x, EulerMaruyama(), grid=[0.01, 1.0])
solve(rev, x, Heun(), grid=[0.01, 1.0], end="denoise")
solve(rev, np.zeros((3, 2)), Heun(), steps=4)

# solvers
DDIM(eta=-0.1)
DDIM(eta=nan)
DDIM(eta="1")
Heun(churn=-1.0)
Heun(churn=nan)
DPMpp2M(order=7)
Multistep(order=0)
Multistep(order=2.5)
Multistep(order=99)
Multistep(form="nose")
Multistep(variable="lamda")
Multistep(starter="none")
UniPC(order=-1)
DEIS(order="3")
LinearMultistep(order=0)
SASolver(tau=-1.0)
SASolver(tau=nan)
SingleStep(order=9)
AdaptiveRungeKutta(rtol=0.0, atol=0.0)
AdaptiveRungeKutta(rtol=-1.0)
AdaptiveRungeKutta(rtol=nan)
AdaptiveRungeKutta(rtol="1e-3")
AdaptiveRungeKutta(max_steps=0)
AdaptiveRungeKutta(tableau="dopri9")
AdaptiveRungeKutta(coordinate="angel")
sample(rev, (3, 2), AdaptiveRungeKutta(rtol=1e-30, atol=1e-30, max_steps=200))
sample(rev, (3, 2), AdaptiveRungeKutta(max_steps=2))
AdaptiveDPMSolver(order=5)
AdaptiveDPMSolver(rtol=-1.0)
GottaGoFast(rtol=nan)
GottaGoFast(theta=0.0)
RungeKutta(tableau="rk5")
RungeKutta(tableau=None)
PredictorCorrector(corrector="langevine")
PredictorCorrector(predictor="heunn")
PredictorCorrector(corrector_steps=-1)
PredictorCorrector(corrector=Langevin(snr=-1.0))
Langevin(snr=nan)
Langevin(norm="max")
AnnealedLangevin(snr=0.0)
ERSDE(order=9)
ERSDE(noise="bad")
TorchDiffEq(method="euler9")
sample(rev, (3, 2), TorchDiffEq(method="euler"))
sample(rev, (3, 2), TorchSDE())
TorchSDE(method="bad")
SciPyODE(method="RK99")
SciPyODE(rtol=-1.0)
recommend(0)
recommend(-4)
recommend(2.5)
recommend("20")
recommend(None)
BrownianPath("seed")
BrownianPath([1, 2, "x"])
Recorded([1.0])
sample(rev, (3, 2), EulerMaruyama(), steps=9, rng=Recorded([x]))

# score models
ScoreModel(None, sde)
ScoreModel(net, None)
ScoreModel(net, "vp")
ScoreModel(net, sde, "niose")
ScoreModel(net, sde, parameterization=None)
ScoreModel(net, sde, noise_level="idx")
ScoreModel(net, sde, noise_level="index")
ScoreModel(net, sde, input_scaling="units")
ScoreModel(net, sde, "edm", sigma_data=0.0)
ScoreModel(net, sde, "noise", sigma_data=nan)
ScoreModel(net, sde, data_spec=(3, 8, 8))
ScoreModel.from_config({})
ScoreModel.from_config(None)
ScoreModel.from_config({"network": {"name": "mpl"}, "sde": {"name": "vp"}})
ScoreModel.from_config({"network": {"name": "mlp", "mlp": {"shape": [2]}}, "sde": {"name": "vpp"}})
ScoreModel.from_config({"network": {"name": "mlp", "mlp": {"shape": [2]}}, "sde": {"name": "vp"}, "levels": -3})
ScoreModel.from_config({"network": {"name": "mlp", "mlp": {"shape": [2]}}, "sde": {"name": "vp"}, "leves": 3})
ScoreModel.from_config({"network": {"name": "mlp", "mlp": {"shape": [2], "width": "a"}}, "sde": {"name": "vp"}})
ScoreModel.from_config({"network": {"name": "mlp", "mlp": {"shape": []}}, "sde": {"name": "vp"}})
ScoreModel(net, sde).config()
ScoreModel(net, sde).sample(3, DDIM(), steps=4)
model(x, 0.0)
model(x, nan)
model(x, "0.5")
model(x, None)
model(x, torch.tensor([0.1, nan, 0.3]))
model(x, torch.tensor([0.1, 5.0, 0.3]))
model(x, torch.tensor([0.1, 0.2]))
model(x.tolist(), 0.5)
model(x.long(), 0.5)
model(torch.zeros(3, 5), 0.5)
model.sample(0, DDIM(), steps=4)
model.sample(-3, DDIM(), steps=4)
model.sample("3", DDIM(), steps=4)
model.sample(3, "dimm", steps=4)
model.sample(3)
model.sample(3, DDIM(), steps=4, condition={"class_label": torch.zeros(3)})
model.sample(3, DDIM(), steps=4, device="cpu")
classed.sample(3, DDIM(), steps=4, condition={"class_label": torch.tensor([0, 1, 99])})
classed.sample(3, DDIM(), steps=4, condition={"class_label": torch.tensor([0, 1, -1])})
classed.sample(3, DDIM(), steps=4, condition={"class_label": [0, 1, 2]})
classed.sample(3, DDIM(), steps=4, condition={"class_label": torch.tensor([0.0, 1.0, 2.0])})
classed.sample(3, DDIM(), steps=4, condition={"class_label": torch.tensor([0, 1])})
classed.sample(3, DDIM(), steps=4, condition={"class_label": 1})
classed.sample(3, DDIM(), steps=4, condition={"klass": torch.tensor([0, 1, 2])})
classed.reverse(torch.tensor([0, 1, 2]))
classed.reverse({"class_label": torch.tensor([0, 1, 77])})
sample(classed.reverse(), (3, 2), DDIM(), steps=4, condition={"class_label": torch.tensor([0, 1, 77])})
ClassifierFreeGuidance(model, 2.0)
ClassifierFreeGuidance(classed.reverse(), nan)
ClassifierFreeGuidance(classed.reverse(), "2")
sample(ClassifierFreeGuidance(classed.reverse(), 2.0), (3, 2), DDIM(), steps=4)
ClassifierFreeGuidance(classed.reverse(), 2.0, drop="class_label")
ClassifierFreeGuidance(classed.reverse(), 2.0, drop=[3])
ClassifierFreeGuidance(classed.reverse(), 2.0, null=["class_label"])
ClassifierFreeGuidance(classed.reverse(), 2.0, null={}, drop=())
classed.sample(3, DDIM(), steps=4, guidance="2", condition={"class_label": torch.tensor([0, 1, 2])})
classed.sample(3, DDIM(), steps=4, guidance=None, condition={"class_label": torch.tensor([0, 1, 2])})
ClassifierFreeGuidance(classed.reverse({"class_label": torch.tensor([0, 1, 2])}), 2.0, drop=("klass",))(x, 0.5)
ClassifierFreeGuidance(classed.reverse({"class_label": torch.tensor([0, 1, 2])}), 2.0, null={"klass": None})(x, 0.5)
ClassifierFreeGuidance(classed.reverse({"class_label": torch.arange(3)}), 2.0, {"class_label": torch.arange(1)})(x, 0.5)
ClassifierFreeGuidance(classed.reverse({"class_label": torch.arange(3)}), 2.0, null={"class_label": 3})(x, 0.5)
ClipData(rev, 1.0, -1.0)
ClipData(rev, nan, 1.0)
ClipData(None)
sample(rev, (3, 2), DDIM(), steps=4, project=inpaint(torch.zeros(5), torch.ones(2)))
sample(rev, (3, 2), DDIM(), steps=4, project=inpaint(torch.zeros(2), torch.ones(7)))
sample(rev, (3, 2), DDIM(), steps=4, project=inpaint([0.0, 0.0], [True, False]))
sample(rev, (3, 2), DDIM(), steps=4, project=inpaint(torch.full((2,), nan), torch.ones(2)))
DataSpec((0, 3))
DataSpec(("a",))
DataSpec(3)
Affine((2,), scale=0.0)
Affine((2,), shift=nan)
Affine((2,), scale="2")
DataSpec((2,), levels=1)
DataSpec((2,), levels=2.5)
DataSpec((2,), conditions=3)
DataSpec((2,), levels=0)
images.data_spec.check(torch.full((2, 1, 4, 4), 99))
images.data_spec.check(torch.zeros(2, 3, 4, 4))
images.data_spec.check(torch.zeros(0, 1, 4, 4))
images.data_spec.check(np.zeros((2, 1, 4, 4)))

# networks
MLP(())
MLP((2,), width=0)
MLP((2,), depth=-1)
MLP((2,), 3)
MLP((2,), {"class_label": 3})
MLP((2,), {"class_label": {"kind": "class", "classes": -2}})
MLP((2,), {"class_label": {"kind": "klass", "classes": 3}})
MLP((2,), {"class_label": {"kind": "class", "number": 3}})
MLP((2,), {"x": {"kind": "class", "classes": 3}})
UNet((1, 8, 8), {"low": {"kind": "image", "shape": (1, 4, 4)}}, channels=8)
NCSNv2((1, 8, 8), {"class_label": {"kind": "class", "classes": 3}})
UNet((1, 8, 8), channels=0)
UNet((1, 7, 7), channels=8)
UNet((8, 8), channels=8)
UNet((1, 8, 8), channels=8, multipliers=())
UNet((1, 8, 8), channels=8, blocks=0)
UNet((1, 8, 8), channels=8, attention=(5,))
UNet((1, 8, 8), channels=8, dropout=1.5)
UNet((1, 8, 8), channels=8, embedding="fourrier")
NCSNpp((3, 5, 5))
DiT((4, 9, 9), patch=2)
DiT((4, 8, 8), width=10, heads=3)
DiT((4, 8, 8), depth=0)
UNet((1, 8, 8), channels=8)(torch.zeros(2, 3, 8, 8), torch.zeros(2))
UNet((1, 8, 8), channels=8)(torch.zeros(2, 1, 8, 8), torch.zeros(3))
UNet((1, 8, 8), channels=8)(torch.zeros(2, 1, 8, 8), torch.zeros(2), class_label=torch.zeros(2).long())
MLP((2,), THREE)(x, torch.zeros(3), class_label=torch.tensor([0, 1, 9]))
MLP((2,), THREE)(x, torch.zeros(3), class_label=torch.tensor([0, 1]))
MLP((2,), THREE)(x, torch.zeros(3), class_label=1)
MLP((2,), THREE)(x, torch.zeros(3), klass=torch.tensor([0, 1, 2]))
MLP((2,), {"text": {"kind": "tokens", "shape": (2, 3)}})(x, torch.zeros(3), text=torch.zeros(3, 2, 3))

# objectives and training
DenoisingScoreMatching(net)
DenoisingScoreMatching(None)
DenoisingScoreMatching(model, weighting="snr")
DenoisingScoreMatching(model, times="log")
DenoisingScoreMatching(model, metric="sum")
DenoisingScoreMatching(model, weighting=MinSNRWeighting)
DenoisingScoreMatching(model, times=LogNormalTimes(std=nan))
DenoisingScoreMatching(model, times=LogNormalTimes(mean=1e4))
DenoisingScoreMatching(model, weighting=MinSNRWeighting(-5.0))
DenoisingScoreMatching(model, metric=PseudoHuber(0.0))
DenoisingScoreMatching(model, input_perturbation=-0.1)
DenoisingScoreMatching(ScoreModel(net, FlowSDE().discretize(20), noise_level="index"), weighting="sigmoid")
DenoisingScoreMatching(model).loss(x.tolist())
DenoisingScoreMatching(model).loss(torch.zeros(3, 7))
DenoisingScoreMatching(model).loss(x * nan)
DenoisingScoreMatching(model).loss(x, rng=0)
DenoisingScoreMatching(model).loss(x, {"klass": torch.tensor([0, 1, 2])})
DenoisingScoreMatching(model).loss(x, phase="generator")
DenoisingScoreMatching(model).at_times(x.long(), torch.zeros(3), x)
DenoisingScoreMatching(model).at_times(x[0, 0], torch.zeros(3), x)
DenoisingScoreMatching(model).at_times(x, torch.zeros(2), x)
DenoisingScoreMatching(model).at_times(x, torch.full((3,), 7.0), x)
DenoisingScoreMatching(model).at_times(x, torch.full((3,), nan), x)
DenoisingScoreMatching(model).at_times(x, torch.full((3,), 0.5), torch.zeros(3, 3))
DenoisingScoreMatching(ScoreModel(net, chain, noise_level="index")).at_times(x, torch.tensor([0, 1, 99]), x)
DenoisingScoreMatching(ScoreModel(net, chain, noise_level="index")).at_times(x, torch.tensor([0.0, 1.0, 2.0]), x)
train(None, tmp)
train({}, tmp)
train("digits_vp", tmp)
train(toy("training.steps=0"), tmp)
train(toy("training.steps=-5"), tmp)
train(toy("training.batch_size=0"), tmp)
train(toy("training.learning_rate=-1.0"), tmp)
train(toy("training.learning_rate=nan"), tmp)
train(toy("training.ema_decay=1.5"), tmp)
train(toy("training.optimizer=adamm"), tmp)
train(toy("training.decay=cosin"), tmp)
train(toy("training.precision=fp8"), tmp)
train(toy("objective.denoising.weighting.name=snr"), tmp)
train(toy("training.keep=0"), tmp)
train(toy("training.log_every=0"), tmp)
train(toy("training.eval_samples=0"), tmp)
train(toy("training.accumulation=0"), tmp)
train(toy("training.accumulation=1000"), tmp)
train(toy("training.warmup=-1"), tmp)
train(toy("training.clip=nan"), tmp)
train(toy("sampling.steps=0", "training.sample_every=1"), tmp)
train(toy("sampling.end=x", "training.sample_every=1"), tmp)
train(toy("sampling.n=0", "training.sample_every=1"), tmp)
train(toy("sampling.solver.name=hean", "training.sample_every=1"), tmp)
train(toy("sde.chain=1"), tmp)
train(toy("sde.chain=-4"), tmp)
train(toy("network.name=unet"), tmp)
train(toy("network.mlp.width=0"), tmp)
train(toy("model.noise_level=index"), tmp)
train(toy("data.name=imagenet"), tmp)
train(toy("data.shape=(3,)"), tmp)
train(toy(), file_of("not a folder"))

# own code, conditions
configs.load("toy_ring", ["--config.network.name=nowhere:Net"])
configs.load("toy_ring", ["--config.network.name=os:system"])
configs.load("toy_ring", ["--config.network.name=subprocess:Popen"])
configs.load("toy_ring", ["--config.network.name=torch.nn:Linea"])
configs.load("toy_ring", ["--config.network.name=:"])
configs.load("toy_ring", ["--config.network.Net.width=3"])
configs.load("toy_ring", ["--config.network.name=mlp:"])
configs.load("toy_ring", ["--config.objective.denoising.times.lognormal.men=3"])
configs.load("toy_ring", ["--config.objective.denoising.times=uniform"])
configs.load("toy_ring", ["--config.objective.denoising.times.name=torch.nn:Linear"])
configs.use(toy(), "netwrk", "mlp")
configs.use(toy(), "network", "mpl")
configs.use(toy(), "network", "mlp", widht=3)
configs.use(toy(), "network", "mlp", width="a")
configs.use(toy(), "network", 3)
configs.use(toy(), "network", None)
configs.use(toy(), "network", dict)
configs.use(toy(), "", "mlp")
configs.use(None, "network", "mlp")
configs.from_dict({"network": {"name": "nowhere:Net", "Net": {}}})
configs.from_dict({"network": {"name": 3}})
configs.from_dict({"network": {"name": None}})
configs.from_dict({"objective": {"name": "denoising", "denoising": {"times": "uniform"}}})
configs.from_dict({"codec": {"name": "affine", "affine": {"scale": "a"}}})
configs.make_objective(toy("objective.name=denoisin"), model)
configs.make_objective(toy("objective.denoising.times.name=lat"), model)
configs.make_objective(toy("objective.name=edm", "objective.edm.times.lognormal.std=-1"), model)
configs.make_objective(toy(), None)
configs.make_codec(toy("codec.name=affin"), DataSpec((2,)))
configs.make_codec(toy("codec.affine.scale=-1"), DataSpec((2,)))
configs.make_codec(toy("codec.affine.per=pixel"), DataSpec((2,)))
load_model(of(network={"name": "os:system", "system": {"command": "true"}}))
load_model(of(network={"name": "nowhere:Net"}))
load_model(of(sde={"name": "builtins:dict"}))
train(toy("training.condition_dropout=2"), tmp)
train(toy("training.condition_dropout=text:0.1"), tmp)
train(toy("training.condition_dropout=a:b:c"), tmp)
train(toy("training.condition_dropout=nan"), tmp)
$ train --config=toy_ring --workdir=TMP --import=nowhere
$ train --config=toy_ring --workdir=TMP --import=
$ train --config=toy_ring --workdir=TMP --import=.relative
$ train --config=toy_ring --workdir=TMP --config.network.name=nowhere:Net
$ train --config=toy_ring --workdir=TMP --condition.y=3
$ sample --workdir=RUN --out=TMP.npy --condition.y=1
$ sample --workdir=RUN --out=TMP.npy --condition.y
$ sample --workdir=RUN --out=TMP.npy --condition.=1
$ sample --workdir=RUN --out=TMP.npy --condition.class_label=3
$ sample --workdir=RUN --out=TMP.npy --solver=nowhere:Solver
$ likelihood --workdir=RUN --given --out=TMP
$ likelihood --workdir=RUN --given-class --out=TMP
$ likelihood --workdir=RUN --given=text --out=TMP
$ likelihood --workdir=RUN --condition.y=a.npy --out=TMP
$ compare --config=toy_ring --solvers=heun --condition.y=3 --out=TMP
$ compare --workdir=RUN --solvers=heun --condition.y=3 --out=TMP
$ configs --condition.y=3

# files
load_model("nowhere")
load_model(None)
load_model(3)
load_model(tmp)
load_model(file_of("not safetensors"))
load_model(good, device="gpu")
load_model(good, device="cuda:99")
load_model(changed(truncate))
load_model(changed(flip_header))
load_model(header("{"))
load_model(header("[]"))
load_model(header('{"format": "scoresde-9", "model": {}}'))
load_model(header('{"format": "scoresde-1", "model": {}}'))
load_model(header('{"format": "scoresde-1", "model": 3}'))
load_model(header('{"format": "scoresde-1", "model": ' + "[" * 100000 + "]" * 100000 + "}"))
load_model(of(network={"name": "mlp", "mlp": {"shape": [2], "width": 10**9}}))
load_model(of(network={"name": "mlp", "mlp": {"shape": [2], "depth": 10**9}}))
load_model(of(network={"name": "mlp", "mlp": {"shape": [10**12]}}))
load_model(of(sde={"name": "vp", "vp": {"beta_max": -1.0}}))
load_model(of(sde={"name": "vp", "vp": {"beta_max": None}}))
load_model(of(levels=10**12))
load_model(of(sigma_data=0.0))
load_model(of(sigma_data="a"))
load_model(of(parameterization=["v"]))
load_model(of(data_spec={"shape": [-2]}))
load_model(of(data_spec=3))
load_model(tensors(lambda t: {k: v * nan for k, v in t.items()}))
load_model(tensors(lambda t: {k: v.to(torch.float16) if "bias" in k else v for k, v in t.items()}))
load_model(tensors(lambda t: {k: (v * 100).to(torch.int32) for k, v in t.items()}))
load_model(tensors(lambda t: dict(list(t.items())[1:])))
load_model(tensors(lambda t: {**t, "more": torch.zeros(1)}))
load_model(tensors(lambda t: {k: v[:1] for k, v in t.items()}))
save_model(model, tmp + "/m.pt")
save_model(None, tmp + "/m.safetensors")
save_model(ScoreModel(net, sde), tmp + "/m.safetensors")
save_model(model, "/proc/nowhere/m.safetensors")
load_pretrained("nowhere.pth")
load_pretrained(None)
load_pretrained(tmp)
load_pretrained(file_of("not a checkpoint", "m.pth"))
load_pretrained(file_of("", "m.pt"))
load_pretrained(saved([1, 2]))
load_pretrained(saved({}))
load_pretrained(saved({"model": 3, "ema": 4}))
load_pretrained(saved({"model": {}, "ema": {}}))
load_pretrained(saved({"model": {"a": torch.zeros(1)}, "ema": {"shadow_params": []}}))
load_pretrained(saved({"model": {"a": torch.zeros(1)}, "ema": {"shadow_params": [torch.zeros(1)]}}))
load_pretrained(saved({"enc.8x8_conv.weight": torch.zeros(1)}), preconditioning="edm")
load_pretrained(saved({"enc.8x8_conv.weight": torch.zeros(8, 3, 3, 3)}))
load_pretrained(saved({"x_embedder.proj.weight": torch.zeros(7, 3, 2, 2), "final_layer.linear.weight": torch.zeros(1)}))
load_pretrained(saved({"input_blocks.0.0.weight": torch.zeros(8, 3, 3, 3), "time_embed.0.weight": torch.zeros(8, 8)}))
load_pretrained(folder({"config.json": "{"}))
load_pretrained(folder({"config.json": "[]"}))
load_pretrained(folder({"config.json": '{"_class_name": "UNet2DModel"}'}))
load_pretrained(folder({"config.json": '{"_class_name": "UNet2DModel", "sample_size": 8}', "m.safetensors": "x"}))
load_pretrained(diffusers(block_out_channels="ab"))
load_pretrained(diffusers(sample_size="8"))
load_pretrained(diffusers(down_block_types=3))
load_pretrained(good, config="nowhere")
load_pretrained(good, device="gpu")
from_pretrained("nobody/nothing", local_files_only=True)
from_pretrained("a name with spaces", local_files_only=True)
from_pretrained("")
configs.load("nowhere")
configs.load("digit_vp")
configs.load(None)
configs.load(file_of("def get_config(:", "c.py"))
configs.load(file_of("x = 1", "c.py"))
configs.load(file_of("def get_config(): return 3", "c.py"))
configs.load(file_of("{", "c.json"))
configs.load(file_of('{"nothing": 1}', "c.json"))
configs.load("digits_vp", ["--config.training.steps=many"])
configs.load("digits_vp", ["--config.trainng.steps=5"])
configs.load("digits_vp", ["training.steps=5"])
configs.load("digits_vp", [7])
Arrays(path="nowhere.npz").load()
Arrays(path=file_of("no array", "a.npz")).load()
Arrays(path=npz(images=np.zeros((4, 4)))).load()
Arrays(path=npz(data=np.zeros((4, 1, 4, 4), dtype=object))).load()
Arrays(path=npz(data=np.full((4, 1, 4, 4), np.nan))).load()
Arrays(conditions="pose")
Arrays(conditions="pose:vektor")
Arrays(conditions="pose:vector:x")
Arrays(conditions=["pose:vector"])
Arrays(conditions="pose:vector,pose:class")
Arrays(path=npz(data=np.eye(4)), conditions="pose:vector").load()
Arrays(path=npz(data=np.eye(4), pose=np.eye(3)), conditions="pose:vector").load()
Arrays(path=npz(data=np.eye(4), pose=np.eye(4, dtype=int)), conditions="pose:vector").load()
Arrays(path=npz(data=np.eye(4), y=np.array(["a", "b", "c", "d"])), conditions="y:class").load()
Arrays(path=npz(data=np.eye(4), y=np.float64(1)), conditions="y:tokens").load()
Arrays(path=npz(data=np.eye(4), y=np.full((4, 2), -1)), conditions="y:tokens").load()
Arrays(path=npz(data=np.eye(4), y=np.zeros((4, 0, 2))), conditions="y:tokens").load()
Arrays(path=npz(data=np.zeros((0, 1, 4, 4)))).load()
Digits(held_out=0).load()
Digits(held_out=99999).load()
Digits(held_out=-1).load()

# likelihoods
log_likelihood(model, x)
log_likelihood(rev, x.tolist())
log_likelihood(rev, x.long())
log_likelihood(rev, nan * x)
log_likelihood(rev, x[:0])
log_likelihood(rev, torch.zeros(3, 7), steps=4)
log_likelihood(revc, x)
log_likelihood(rev, x, steps=0)
log_likelihood(rev, x, steps=-4)
log_likelihood(rev, x, steps=2.5)
log_likelihood(rev, x, steps=4, tol=1e-3)
log_likelihood(rev, x, tol=0.0)
log_likelihood(rev, x, tol=nan)
log_likelihood(rev, x, divergence="exakt")
log_likelihood(rev, x, steps=4, divergence="hutchinson", num_probes=0)
log_likelihood(rev, x, steps=4, divergence="hutchinson", num_probes=2.5)
log_likelihood(rev, x, steps=4, probes="gausian", divergence="hutchinson")
log_likelihood(rev, x, steps=4, target_se=-1.0)
log_likelihood(rev, x, steps=4, target_se=nan)
log_likelihood(rev, x, steps=4, correct=("priors",))
log_likelihood(rev, x, steps=4, rng=[1, 2])
log_likelihood(rev, x, steps=4, solver="huen")
log_likelihood(rev, x, steps=4, solver=EulerMaruyama())
log_likelihood(rev, x, steps=4, grid="karas")
log_likelihood(rev, x, steps=4, chunk=0)
log_likelihood(rev, x, tol=1e-3, max_steps=0)
log_likelihood(rev, x, steps=4, sigma_data=-1.0)
log_likelihood(rev, x, steps=4, prior=3)
log_likelihood(rev, x, steps=4).trace_bar(2.0)
log_likelihood(rev, x, steps=4).refine(target_se=-1.0)
log_likelihood(ClassifierFreeGuidance(classed.reverse({"class_label": torch.tensor([0, 1, 2])}), 2.0), x, steps=4)
elbo(model, x)
elbo(rev, nan * x)
elbo(rev, x, draws=0)
elbo(revc, x, variance="medium")
elbo(rev, torch.zeros(3, 9))
bits_per_dim(rev, x)
bits_per_dim(model, x.tolist())
bits_per_dim(model, torch.zeros(3, 9))
bits_per_dim(images, torch.full((2, 1, 4, 4), 99))
bits_per_dim(images, torch.zeros(2, 1, 4, 4) + 0.5)
bits_per_dim(images, digits, batch_size=0)
bits_per_dim(images, digits, samples=0)
bits_per_dim(images, digits, bound="iwae")
bits_per_dim(images, digits, levels=256)
bits_per_dim(images, digits, dequantization="normal")
bits_per_dim(images, digits, condition={"class_label": torch.tensor([0, 1])})
bits_per_dim(images, digits, condition=torch.tensor([0, 1]))
bits_per_dim(images, digits, devices=["gpu"])
bits_per_dim(images, digits, devices=[])
bits_per_dim(images, digits, stepz=4)
encode(rev, x, steps=0)
encode(revc, x)
decode(rev, x.long())
interpolate(x, torch.zeros(2, 2), 0.5)
interpolate(x, x, nan)
interpolate(x, x, "0.5")
divergence(3, x)
divergence(lambda y: y[:1], x)
energy_distance(x, torch.zeros(3, 5))
energy_distance(x, x[:0])
energy_distance(x, nan * x)
mmd2(x, x, kernel="gauss")
mmd2(x, x, bandwidth=-1.0)
sliced_wasserstein(x, x, projections=0)
frechet_distance(x, x, features="inception")
frechet_distance(x[:1], x[:1])
compare(None, "heun")
compare(rev, "heun")
compare(rev, "huen", shape=(2,))
compare(rev, "heun", shape=(2,), n=3, condition={"y": torch.zeros(2)})
compare(rev, "heun", shape=(2,), n=3, condition=torch.zeros(3))
compare(rev, "heun", shape=(2,), n=3, guidance=2.0)
compare(classed, "heun", n=3, condition={"klass": torch.tensor([0, 1, 2])})
compare(classed, "heun", n=3, condition={"class_label": torch.tensor([0, 1, 77])})
compare(classed, "heun", n=3, condition={"class_label": torch.tensor([0, 1, 2])}, guidance=nan)
compare(classed, "heun", n=3, condition={"class_label": torch.tensor([0, 1, 2])}, guidance="2")
compare(rev, "", shape=(2,))
compare(rev, "heun(", shape=(2,))
compare(rev, "heun(churns=1)", shape=(2,))
compare(rev, "heun@karas", shape=(2,))
compare(rev, "heun", shape=(2,), nfe=())
compare(rev, "heun", shape=(2,), nfe=(0,))
compare(rev, "heun", shape=(2,), nfe=(2.5,))
compare(rev, "heun", shape=(2,), n=0)
compare(rev, "heun", shape=(2,), repetitions=0)
compare(rev, "adaptive", shape=(2,), rtol=(2.0,))
compare(rev, "heun", shape=(2,), metrics=("fid",))
compare(rev, "heun", shape=(2,), samples=torch.zeros(5, 9), n=4, nfe=(4,))
compare(rev, "heun", shape=(0,))
compare(rev, 7, shape=(2,))
compare(rev, "heun", shape=(2,), path=file_of("{", "c.jsonl"), n=4, nfe=(4,))

# command line
$
$ fly
$ train
$ train --config=digits_vp
$ train --config=nowhere --workdir=TMP
$ train --config=toy_ring --workdir=TMP --config.training.stepz=5
$ train --config=toy_ring --workdir=TMP --config.training.steps=many
$ train --config=toy_ring --workdir=TMP --config.training=5
$ train --config=toy_ring --workdir=FILE --config.training.steps=1
$ train --config=toy_ring --workdir=RUN --config.training.steps=2 --config.network.mlp.width=64
$ train --config=toy_ring --workdir=RUN --no-resume
$ train --config=toy_ring --workdir=TMP extra
$ sample
$ sample --workdir=nowhere
$ sample --workdir=TMP
$ sample --workdir=RUN --checkpoint=RUN
$ sample --workdir=RUN --device=gpu --out=TMP/s.npy
$ sample --workdir=RUN --device=cuda:99 --out=TMP/s.npy
$ sample --workdir=RUN --steps=0 --out=TMP/s.npy
$ sample --workdir=RUN --steps=4 --nfe=8 --out=TMP/s.npy
$ sample --workdir=RUN --steps=four --out=TMP/s.npy
$ sample --workdir=RUN --nfe=1 --out=TMP/s.npy
$ sample --workdir=RUN --n=0 --out=TMP/s.npy
$ sample --workdir=RUN --n=-5 --out=TMP/s.npy
$ sample --workdir=RUN --solver=huen --out=TMP/s.npy
$ sample --workdir=RUN --class=3 --out=TMP/s.npy
$ sample --workdir=RUN --class=cat --out=TMP/s.npy
$ sample --workdir=RUN --guidance=nan --out=TMP/s.npy
$ sample --workdir=RUN --guidance=2 --out=TMP/s.npy
$ sample --workdir=RUN --out=TMP/s.jpg
$ sample --workdir=RUN --out=/proc/nowhere/s.npy
$ sample --workdir=RUN --config.sampling.end=x --out=TMP/s.npy
$ sample --workdir=RUN --config.sampling.grid.name=karas --out=TMP/s.npy
$ sample --checkpoint=FILE --out=TMP/s.npy
$ sample --workdir=BROKEN:config.json:{ --out=TMP/s.npy
$ sample --workdir=BROKEN:config.json:[] --out=TMP/s.npy
$ sample --workdir=BROKEN:checkpoints/STEP/average.ema.safetensors:x --out=TMP/s.npy
$ train --config=RUN/config.json --workdir=BROKEN:checkpoints/STEP/state.json:{
$ train --config=RUN/config.json --workdir=BROKEN:checkpoints/STEP/state.json:[]
$ train --config=RUN/config.json --workdir=BROKEN:checkpoints/STEP/state.json:{}
$ train --config=RUN/config.json --workdir=BROKEN:checkpoints/STEP/optimizer.train.safetensors:x
$ train --config=RUN/config.json --workdir=BROKEN:metrics.jsonl:[1]
$ likelihood --workdir=nowhere
$ likelihood --workdir=RUN --n=0 --out=TMP
$ likelihood --workdir=RUN --n=999999 --out=TMP
$ likelihood --workdir=RUN --given-class --out=TMP
$ likelihood --workdir=RUN --n=2 --config.likelihood.steps=0 --out=TMP
$ likelihood --workdir=RUN --n=2 --config.likelihood.tol=-1.0 --out=TMP
$ likelihood --workdir=RUN --n=2 --config.likelihood.divergence=exakt --out=TMP
$ likelihood --workdir=RUN --n=2 --config.likelihood.batch_size=0 --out=TMP
$ likelihood --workdir=RUN --n=2 --out=FILE
$ likelihood --workdir=RUN --n=2 --config=digits_vp --out=TMP
$ compare --solvers=heun
$ compare --config=digits_vp --solvers=heun
$ compare --config=toy_ring --solvers=huen --out=TMP
$ compare --config=toy_ring --solvers=heun --nfe=a,b --out=TMP
$ compare --config=toy_ring --solvers=heun --nfe=0 --out=TMP
$ compare --config=toy_ring --solvers=heun --grid=karas --out=TMP
$ compare --config=toy_ring --solvers=heun --n=0 --out=TMP
$ compare --config=toy_ring --solvers=heun --metrics=fid --out=TMP
$ compare --config=toy_ring --solvers=heun --features=nowhere:f --out=TMP
$ compare --config=toy_ring --solvers=heun --features=inception --metrics=frechet --nfe=4 --n=4 --out=TMP
$ compare --config=toy_ring --solvers=heun --class=3 --out=TMP
$ compare --workdir=RUN --solvers=heun --guidance=2 --out=TMP
$ compare --config=toy_ring --solvers=heun --rtol=x --out=TMP
$ compare --config=toy_ring --solvers=heun --device=gpu --out=TMP
$ convert
$ convert nowhere.pth TMP/o.safetensors
$ convert FILE TMP/o.safetensors
$ convert RUN TMP/o.pt
$ convert nowhere.pkl TMP/o.safetensors
$ demo --config=nowhere --workdir=TMP
$ demo --config=toy_ring --workdir=TMP --config.training.steps=1
$ configs extra
"""


# --- what the cases use -----------------------------------------------------------------------------------------------
class Fixtures:
    """Models, files and folders, in a temporary folder of their own."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0
        self.config = {
            "network": {"name": "mlp", "mlp": {"shape": [2], "width": 8, "depth": 1}},
            "sde": {"name": "vp", "vp": {}},
            "parameterization": "v",
            "data_spec": {"shape": [2]},
        }
        self.model = scoresde.ScoreModel.from_config(self.config)
        self.good = scoresde.save_model(self.model, root / "good.safetensors")
        quiet = ["training.steps=1", "training.tensorboard=False", "training.sample_every=0", "training.eval_every=0"]
        self.quiet = [*quiet, "training.batch_size=4", "sampling.n=4", "sampling.steps=2", "network.mlp.width=16"]
        scoresde.train(self.toy(), root / "run", progress=False)

    def new(self, suffix: str = "") -> Path:
        self.count += 1
        return self.root / f"{self.count}{suffix}"

    def toy(self, *overrides: str) -> Any:
        return configs.load("toy_ring", [f"--config.{o}" for o in (*self.quiet, *overrides)])

    def file_of(self, text: str, name: str = "x.safetensors") -> str:
        path = self.new(f"-{name}")
        path.write_text(text)
        return str(path)

    def header(self, text: str) -> str:
        from safetensors.torch import save_file

        path = self.new(".safetensors")
        save_file(self.model.state_dict(), path, metadata={"format": "pt", "scoresde": text})
        return str(path)

    def written(self, tensors: Any, config: Any) -> str:
        try:
            from scoresde.storage.tensors import write_tensors
        except ImportError:  # of earlier versions
            from scoresde.training.checkpoint import write_tensors
        path = self.new(".safetensors")
        write_tensors(tensors, path, config)
        return str(path)

    def of(self, **changes: Any) -> str:
        return self.written(self.model.state_dict(), {**self.config, **changes})

    def tensors(self, change: Any) -> str:
        return self.written(change(self.model.state_dict()), self.config)

    def changed(self, change: Any) -> str:
        path = self.new(".safetensors")
        path.write_bytes(change(self.good.read_bytes()))
        return str(path)

    def saved(self, content: Any) -> str:
        path = self.new(".pth")
        torch.save(content, path)
        return str(path)

    def folder(self, files: dict[str, str]) -> str:
        path = self.new()
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)
        return str(path)

    def diffusers(self, **changes: Any) -> str:
        config = {
            "_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [32, 32],
            "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"], **changes
        }  # fmt: skip
        from safetensors.torch import save_file

        path = Path(self.folder({"config.json": json.dumps(config)}))
        save_file(self.model.state_dict(), path / "weights.safetensors")
        return str(path)

    def npz(self, **arrays: Any) -> str:
        path = self.new(".npz")
        np.savez(path, **arrays)
        return str(path)

    def argument(self, word: str) -> str:
        """A word of a command line with its folders filled in."""
        if "BROKEN:" in word:
            flag, _, (name, text) = *word.partition("BROKEN:")[:2], word.partition("BROKEN:")[2].split(":", 1)
            copy = self.new()
            shutil.copytree(self.root / "run", copy)
            target = next(copy.glob(name.replace("STEP", "step_*")))
            target.write_text(text)
            return f"{flag}{copy}"
        made = {"TMP": lambda: self.new(), "FILE": lambda: self.file_of("text"), "RUN": lambda: self.root / "run"}
        for name, make in made.items():
            word = word.replace(name, str(make())) if name in word else word
        return word

    def names(self) -> dict[str, Any]:
        """What the cases may say."""
        names: dict[str, Any] = {}
        for module in (sde_lib, solvers, scoresde):
            names |= {name: getattr(module, name) for name in module.__all__}
        networks = ("NCSNpp", "NCSNv2", "DiT")
        for module, extra in (("scoresde.data", ("Arrays", "Digits")), ("scoresde.networks", networks)):
            names |= {name: getattr(__import__(module, fromlist=["*"]), name) for name in extra}
        if hasattr(scoresde.ScoreModel, "from_pretrained"):  # of earlier versions
            names["from_pretrained"] = scoresde.ScoreModel.from_pretrained
        sde = sde_lib.VPSDE()
        chain = sde.discretize(50)
        mixture = sde_lib.GaussianMixture([[-1.0, 0.3], [0.8, -0.5]], std=0.3)
        small = {"network": {"name": "unet", "unet": {"shape": [1, 4, 4], "channels": 8}}, "data_spec": None}
        images = scoresde.ScoreModel.from_config({**self.config, **small}).eval()
        images.data_spec = scoresde.DataSpec((1, 4, 4), 16)
        three = {"class_label": {"kind": "class", "classes": 3}}
        classed = {"name": "mlp", "mlp": {"shape": [2], "width": 8, "depth": 1, "conditions": three}}
        spec = {"shape": [2], "conditions": three}
        helpers = ("toy", "file_of", "header", "of", "tensors", "changed", "saved", "folder", "diffusers", "npz")
        return names | {name: getattr(self, name) for name in helpers} | {
            "torch": torch, "np": np, "math": math, "nan": math.nan, "inf": math.inf, "configs": configs,
            "sde": sde, "chain": chain, "rev": mixture.reverse(sde), "revc": mixture.reverse(chain),
            "x": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
            "digits": torch.arange(32).reshape(2, 1, 4, 4) % 16,
            "net": scoresde.MLP((2,), width=8, depth=1), "model": self.model.eval(), "images": images,
            "classed": scoresde.ScoreModel.from_config({**self.config, "network": classed, "data_spec": spec}).eval(),
            "THREE": three, "good": str(self.good), "tmp": str(self.new()),
            "truncate": lambda b: b[: len(b) // 2], "flip_header": lambda b: b[:20] + bytes([b[20] ^ 255]) + b[21:],
        }  # fmt: skip


# --- judging one case -------------------------------------------------------------------------------------------------
OURS = [str(Path(module.__file__).parent) + os.sep for module in (scoresde, sde_lib, solvers)]
RAISE = {dis.opmap[name] for name in ("RAISE_VARARGS", "RERAISE") if name in dis.opmap}


def judged(error: BaseException) -> str:
    """"refused" if our own code raised it on purpose and said why; "bare" otherwise."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    text = " ".join(str(error).split())
    code = last.tb_frame.f_code
    if code.co_filename == "<case>":  # Python's words for an argument that does not exist, or is missing
        return "refused" if isinstance(error, TypeError) and "argument" in text else "bare"
    if isinstance(error, ImportError | FileNotFoundError | NotADirectoryError | FileExistsError) and len(text) > 20:
        return "refused"  # the system's sentence, with the path
    ours = any(code.co_filename.startswith(root) for root in OURS)
    raised = code.co_code[last.tb_lasti] in RAISE
    return "refused" if ours and raised and len(text.split()) >= 3 else "bare"


def called(case: str, fixtures: Fixtures, names: dict[str, Any]) -> None:
    """Run a case of the API; raises what it raises."""
    if "nobody" in case or "spaces" in case:
        os.environ["HF_HUB_OFFLINE"] = "1"
    eval(compile(case, "<case>", "eval"), dict(names))


CAUGHT = (ArithmeticError, ImportError, OSError, TypeError, ValueError)
"""What the command line turns into one line; with --traceback it comes out, so that it is judged like any other."""


def commanded(case: str, fixtures: Fixtures) -> tuple[str, str]:
    """Run a command line: what `outcome` says where it ends by itself. Raises what would be shown as a line."""
    from scoresde.cli import main

    arguments = [fixtures.argument(word) for word in shlex.split(case[1:])]
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(["--traceback", *arguments])
        except SystemExit as error:  # of the parser of arguments
            code = error.code
    told = err.getvalue().strip().splitlines()[-1:]
    return ("accepted" if code == 0 else "refused" if code == 2 else "bare"), "".join(told)


def outcome(case: str, fixtures: Fixtures, names: dict[str, Any]) -> tuple[str, str]:
    """(kind, what was said)."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            if case.startswith("$"):
                kind, told = commanded(case, fixtures)
            else:
                called(case, fixtures, names)
                kind, told = "accepted", ""
        except Exception as error:
            kind = "bare" if case.startswith("$") and not isinstance(error, CAUGHT) else judged(error)
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if kind == "bare":
                frame = traceback.extract_tb(error.__traceback__)[-1]
                told += f" [{Path(frame.filename).name}:{frame.lineno}]"
    ours = [w for w in seen if issubclass(w.category, RuntimeWarning | UserWarning)]
    if kind == "accepted" and ours:
        return "warned", str(ours[-1].message)
    return kind, told


# --- the run ----------------------------------------------------------------------------------------------------------
def sections() -> list[tuple[str, str]]:
    """(area, case) of every line."""
    found, area = [], ""
    for line in CASES.strip().splitlines():
        if line.startswith("# "):
            area = line[2:]
        elif line:
            found.append((area, line))
    return found


def child(write: int, cases: list[tuple[int, str]], fixtures: Fixtures) -> None:
    """In a forked process: a line of JSON before and after every case."""
    names = fixtures.names()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.dup2(null, 1)
    with os.fdopen(write, "w", buffering=1) as out:
        for i, case in cases:
            kind, told = outcome(case, fixtures, names)
            out.write(json.dumps([i, kind, told[:400]]) + "\n")
    os._exit(0)


def run(cases: list[str], fixtures: Fixtures, seconds: float) -> list[tuple[str, str]]:
    """Outcomes, in order; a child that is late or dead is replaced, and its case is a hang."""
    results: list[tuple[str, str]] = []
    while len(results) < len(cases):
        fixtures.count += 1000  # names of files that an earlier child has not used
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(write, list(enumerate(cases))[len(results) :], fixtures)
        os.close(write)
        buffer = b""
        while True:
            ready, _, _ = select.select([read], [], [], seconds)
            got = os.read(read, 65536) if ready else b""
            if not got:
                break
            *lines, buffer = (buffer + got).split(b"\n")
            results += [tuple(json.loads(line)[1:]) for line in lines]
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if len(results) < len(cases):
            results.append(("hang", "no answer" if not ready else "the process died"))
    return results


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--all", action="store_true", help="print every case, not only what is not refused")
    options.add_argument("--only", default="", metavar="TEXT", help="cases that contain this")
    options.add_argument("--seconds", type=float, default=10.0, help="limit of time per case")
    options.add_argument("--json", metavar="FILE", help="write the outcomes there")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    pairs = [(area, case) for area, case in sections() if chosen.only in case]
    with tempfile.TemporaryDirectory() as root:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fixtures = Fixtures(Path(root))
        before = Path.cwd()
        os.chdir(root)
        results = run([case for _, case in pairs], fixtures, chosen.seconds)
        os.chdir(before)
    for (_, case), (kind, told) in zip(pairs, results, strict=True):
        if chosen.all or kind != "refused":
            print(f"{kind:9} {case}" + (f"\n          {told}" if told else ""))
    areas = list(dict.fromkeys(area for area, _ in pairs))
    print(f"\n{'':22}{'cases':>9}" + "".join(f"{kind:>10}" for kind in KINDS))
    for area in [*areas, "all"]:
        counts = Counter(r[0] for (a, _), r in zip(pairs, results, strict=True) if area in (a, "all"))
        print(f"{area:22}{sum(counts.values()):9}" + "".join(f"{counts[kind]:10}" for kind in KINDS))
    print(f"{time.perf_counter() - start:.0f} s")
    if chosen.json:
        rows = [[case, *result] for (_, case), result in zip(pairs, results, strict=True)]
        Path(chosen.json).write_text(json.dumps(rows, indent=0))


if __name__ == "__main__":
    main()
