"""Objectives in a few lines each, on points of the plane, in float64: proof that the loop takes what it is given."""

from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import softplus

from scoresde.data import Dataset, Split
from scoresde.data.conditions import classes
from scoresde.data.spec import DataSpec
from scoresde.objectives import Average, Objective


def points(n=96, seed=0):
    """A Gaussian in the plane, in two classes."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 2, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 0.5]) + torch.tensor([2.0, -1.0])
    labels = (z[:, 0] > 2.0).long()
    parts = (Split(z[rows], {"class_label": labels[rows]}) for rows in (slice(0, n - 24), slice(n - 24, n)))
    return Dataset("points", *parts, DataSpec((2,), conditions=classes(2)))


def network(inputs, outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


class Adversarial(Objective):
    """A Gaussian generator and its critic, which is regularized on data (R1, Mescheder et al. 2018)."""

    phases: ClassVar = {"critic": ("critic",), "generator": ("generator",)}
    trains = "generator"
    optimizers: ClassVar = {"critic": {"updates": 2, "learning_rate": 2e-2}, "generator": {"beta1": 0.0}}

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.generator, self.critic = nn.Linear(2, 2).double(), network(2, 1)

    def forward(self, phase, batch, at):
        made = self.generator(at.streams.normal("latent", (2,), torch.float64))
        if phase == "generator":
            return softplus(-self.critic(made))[:, 0]
        real = batch.data.requires_grad_()
        score = self.critic(real)
        (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        return (softplus(-score) + softplus(self.critic(made.detach())))[:, 0] + 0.5 * slope.square().sum(1)

    def held_out(self, batch, at):
        return self("generator", batch, at)


class Consistency(Objective):
    """A point and its noisier neighbour have the same image; the less noisy one's is an average's (a target)."""

    def __init__(self):
        super().__init__()
        self.model = network(3, 2)

    def averages(self):
        return {"ema": Average("model", 0.9), "target": Average("model", 0.5, warmup=False)}

    def forward(self, phase, batch, at):
        level = 0.1 + at.streams.lattice("level")
        noise = at.streams.normal("noise", (2,), torch.float64)

        def image(network, level):
            x = batch.data + level[:, None] * noise
            return x - level[:, None] * network(torch.cat([x, level[:, None]], 1))

        with torch.no_grad():
            target = image(at.averages["target"], level - 0.1)
        return (image(self.model, level) - target).square().sum(1)


class Distilled(Objective):
    """A network learns from a frozen one; and it remembers the largest error it has seen, in a buffer of its own."""

    worst: torch.Tensor

    def __init__(self, seed=3):
        super().__init__()
        self.model, self.teacher = network(2, 2), [network(2, 2, seed)]
        self.register_buffer("worst", torch.full((), -torch.inf, dtype=torch.float64))

    def frozen(self):
        return {"teacher": self.teacher[0]}

    def forward(self, phase, batch, at):
        errors = (self.model(batch.data) - self.teacher[0](batch.data)).square().sum(1)
        if self.training:
            largest = errors.detach().max()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            self.worst.copy_(torch.maximum(self.worst, largest))
        return errors


TOYS = {"adversarial": Adversarial, "consistency": Consistency, "frozen teacher": Distilled}
