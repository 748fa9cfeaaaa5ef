"""The averaged weights against their recursion, written out."""

import pytest
import torch
from torch import nn

from scoresde.training import EMA


def test_average_is_its_recursion_with_warm_up():
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone()
    for n in range(1, 120):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, dtype=torch.float64))
        ema.update()
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * model.weight.detach()
    assert d == 0.9 and ema.updates == 119
    torch.testing.assert_close(ema.state_dict()["weight"], expected, rtol=1e-12, atol=1e-12)


def test_constant_weights_stay_and_zero_decay_follows():
    model = nn.Linear(4, 4)
    still, follow = EMA(model, 0.99), EMA(model, 0.0)
    before = model.weight.detach().clone()
    still.update()
    assert torch.equal(still.state_dict()["weight"], before)
    with torch.no_grad():
        model.weight.add_(1.0)
    follow.update()
    torch.testing.assert_close(follow.state_dict()["weight"], model.weight.detach())


def test_applied_swaps_and_gives_back_even_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model(torch.randn(8, 2))  # moves the buffers, an integer one among them
    now = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert all(torch.equal(v, ema.state_dict()[k]) for k, v in model.state_dict().items())
        raise RuntimeError("inside")
    assert all(torch.equal(v, now[k]) for k, v in model.state_dict().items())
    ema.update()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(ema.state_dict()[name], now[name])  # buffers are copied, not averaged


def test_saved_average_continues_as_if_never_stopped():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    ema = EMA(a, 0.9)
    steps = torch.randn(6, 2, 2)

    def advance(model, average, values):
        for value in values:
            with torch.no_grad():
                model.weight.copy_(value)
            average.update()

    advance(a, ema, steps[:3])
    other = EMA(b, 0.9)
    b.load_state_dict(a.state_dict())
    other.load(ema.state_dict(), ema.updates)
    advance(a, ema, steps[3:])
    advance(b, other, steps[3:])
    assert torch.equal(ema.state_dict()["weight"], other.state_dict()["weight"])


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(nn.Linear(1, 1), decay)
