"""The averaged weights against their recursion, written out."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from scoresde.objectives import Average, Objective
from scoresde.training import Averages


class Two(Objective):
    """Two parts; the first one is followed by two averages, the second one by one."""

    trains = "first"
    phases: ClassVar = {"train": ("first", "second")}

    def __init__(self, first=None):
        super().__init__()
        self.first = nn.Linear(3, 2).double() if first is None else first
        self.second = nn.Linear(2, 2)

    def averages(self):
        return {"slow": Average("first", 0.9), "follow": Average("first", 0.0), "plain": Average("second", 0.5, False)}


def randomized(part):
    with torch.no_grad():
        for weight in part.parameters():
            weight.copy_(torch.randn_like(weight))
    return [weight.detach().clone() for weight in part.parameters()]


def test_average_is_its_recursion_with_warm_up():
    objective = Two()
    averages = Averages(objective)
    expected = [weight.detach().clone() for weight in objective.first.parameters()]
    start = objective.second.weight.detach().clone()
    for n in range(1, 120):
        now = randomized(objective.first)
        averages.update(["first"])
        d = min(0.9, (1 + n) / (10 + n))
        expected = [d * mean + (1 - d) * weight for mean, weight in zip(expected, now, strict=True)]
    assert d == 0.9 and averages.updates == {"slow": 119, "follow": 119, "plain": 0}
    for found, mean in zip(averages.modules["slow"].parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), mean, rtol=1e-12, atol=1e-12)
    for found, weight in zip(averages.modules["follow"].parameters(), now, strict=True):
        torch.testing.assert_close(found.detach(), weight)  # a decay of 0 follows
    now = randomized(objective.second)[0]
    averages.update(["second"])  # without a warm-up, from its first update on
    torch.testing.assert_close(averages.modules["plain"].weight.detach(), 0.5 * start + 0.5 * now)


def test_applied_swaps_and_gives_back_even_after_an_error():
    objective = Two(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    averages = Averages(objective)
    randomized(objective.first)
    objective.first(torch.randn(8, 2))  # moves the buffers, an integer one among them
    now = {k: v.clone() for k, v in objective.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), averages.applied():
        for name in ("slow", "plain"):  # the first average of each part
            part = objective.get_submodule(averages.rules[name].part).state_dict()
            assert all(torch.equal(v, part[k]) for k, v in averages.modules[name].state_dict().items())
        raise RuntimeError("inside")
    assert all(torch.equal(v, now[k]) for k, v in objective.state_dict().items())
    averages.update(["first"])
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(averages.modules["slow"].state_dict()[name], now[f"first.{name}"])  # copied, not averaged


def test_averages_are_modules_of_their_own_that_nothing_trains():
    objective = Two()
    averages = Averages(objective)
    assert set(dict(objective.named_children())) == {"first", "second"}
    for module in averages.modules.values():
        assert not module.training and not any(weight.requires_grad for weight in module.parameters())
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(averages.modules["slow"](x), objective.first(x))
    randomized(objective.first)
    assert not torch.allclose(averages.modules["slow"](x), objective.first(x))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay"):
        Average("model", decay)
