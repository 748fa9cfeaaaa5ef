"""The losses of the objectives that prove the seam, in closed form; how they train is in `test_objective_runs`."""

import copy
import math

import pytest
import torch
from torch.nn.functional import softplus
from toy_objectives import TOYS, Adversarial, Consistency, Distilled, points

from scoresde.data.batch import Batch
from scoresde.objectives import At
from scoresde.streams import Streams


def batch(n=16):
    return Batch(points().train.data[:n].clone())


def at(n=16, **averages):
    return At(0, 1, Streams(0, range(n), n), averages)


def test_a_critic_that_knows_nothing_costs_log_2_a_sample_and_teaches_nothing():
    objective = Adversarial()
    for weight in objective.critic[-1].parameters():
        torch.nn.init.zeros_(weight)
    torch.testing.assert_close(objective("critic", batch(), at()), torch.full((16,), 2.0 * math.log(2.0)).double())
    losses = objective("generator", batch(), at())
    torch.testing.assert_close(losses, torch.full((16,), math.log(2.0)).double())
    losses.sum().backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in objective.generator.parameters())


def test_the_penalty_is_half_the_squared_slope_on_data():
    """Of a linear critic w x + b it is |w|^2 / 2 whatever the data, with the gradient w; and what is made carries no
    gradient to the generator in the critic's phase."""
    objective = Adversarial()
    objective.critic = torch.nn.Linear(2, 1).double()
    weight = objective.critic.weight
    losses = objective("critic", batch(), at())
    made = objective.generator(at().streams.normal("latent", (2,), torch.float64)).detach()
    plain = softplus(-objective.critic(batch().data)[:, 0]) + softplus(objective.critic(made)[:, 0])
    torch.testing.assert_close(losses - plain, (0.5 * weight.square().sum()).expand(16))
    (slope,) = torch.autograd.grad((losses - plain).mean(), weight, retain_graph=True)
    torch.testing.assert_close(slope, weight)
    losses.sum().backward()
    assert all(p.grad is None for p in objective.generator.parameters())


def test_a_map_that_finds_the_data_is_consistent():
    """A network that answers the noise leads every level to the data: no loss; the target is the average's."""

    class Noise(torch.nn.Module):
        def forward(self, inputs):
            x, level = inputs[:, :2], inputs[:, 2:]
            return torch.where(level > 0.0, (x - data) / level.clamp(min=1e-9), 0.0)

    data, objective = batch().data, Consistency()
    average = copy.deepcopy(objective.model)
    objective.model = Noise()
    assert float(objective("train", batch(), at(target=Noise())).abs().max()) < 1e-24
    assert float(objective("train", batch(), at(target=average)).min()) > 0.0
    assert set(objective.averages()) == {"ema", "target"}


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    objective = Distilled()
    assert float(objective("train", batch(), at()).detach().max()) > 0.0
    worst = float(objective.worst)
    objective.model = copy.deepcopy(objective.teacher[0])
    assert float(objective("train", batch(), at()).detach().max()) == 0.0 and float(objective.worst) == worst > 0.0
    assert not any(name.startswith("teacher") for name in objective.state_dict())


@pytest.mark.parametrize("name", sorted(TOYS))
def test_toys_run_in_a_loop_of_ones_own(name):
    objective = TOYS[name]()
    averages = {rule: getattr(objective, average.part) for rule, average in objective.averages().items()}
    for phase in objective.phases:
        loss = objective.loss(batch().data, rng=torch.Generator().manual_seed(0), phase=phase, averages=averages)
        again = objective.loss(batch().data, rng=torch.Generator().manual_seed(0), phase=phase, averages=averages)
        assert loss.shape == () and loss.requires_grad and torch.equal(loss, again)
