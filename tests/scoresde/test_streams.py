"""Random numbers of training: known answers, equality under any split, and independence where names differ."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from devices import META, waits
from scipy import stats
from torch import Tensor

from scoresde.streams import Streams, permutation

CALLS = {
    "normal": lambda s: s.normal("a", (3, 5)),
    "normal, float64": lambda s: s.normal("a", (3, 5), torch.float64),
    "normal, bfloat16": lambda s: s.normal("a", (3, 5), torch.bfloat16),
    "uniform": lambda s: s.uniform("a", (7,)),
    "one uniform": lambda s: s.uniform("a"),
    "integers": lambda s: s.integers("a", 1000, (3,)),
    "bernoulli": lambda s: s.bernoulli("a", 0.4),
    "lattice": lambda s: s.lattice("a"),
}


def independent(rows: Tensor) -> None:
    """Asserts that standardized rows (m, n), and their squares, have the correlations of chance: 1 / sqrt(n) each."""
    for values in (rows, rows.square()):
        z = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True)
        pairs = (z @ z.T)[torch.triu(torch.ones(len(z), len(z), dtype=torch.bool), 1)] / math.sqrt(z.shape[1])
        # all of them within the bound, but for a chance of 1e-4; fixed for good, as the numbers are
        assert float(pairs.abs().max()) < NormalDist().inv_cdf(1.0 - 0.5e-4 / len(pairs))


def test_known_answers():
    """The numbers of one place, written down: they are part of what a seed means and change with a release note."""
    s = Streams(17, range(4, 6), 8, 3, ("critic", 1))
    assert s.integers("class", 1000, (2,)).tolist() == [[258, 673], [193, 605]]
    assert s.bernoulli("drop.text", 0.5).tolist() == [True, False]
    assert permutation(8, 17, 2).tolist() == [2, 1, 5, 6, 4, 0, 3, 7]
    # transcendental functions differ in a last place between libraries
    noise = [[0.77933401, 0.1444414], [-0.30089089, 0.096651]]
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(s.normal("noise", (2,)), torch.tensor(noise), **close)
    torch.testing.assert_close(s.uniform("u"), torch.tensor([0.962672055, 0.051732361]), **close)
    t = torch.tensor([0.7175674516871487, 0.8425674516871487], dtype=torch.float64)
    torch.testing.assert_close(s.lattice("t"), t, rtol=1e-15, atol=0)


@pytest.mark.parametrize("call", CALLS)
def test_a_row_is_a_function_of_its_place(call):
    """Bitwise: alone, in any split, in any order; asked again; at the same place reached another way."""
    make, s = CALLS[call], Streams(5, range(12), 12, 40, ("a", 1))
    whole = make(s)
    assert len(whole) == len(s) == 12 and torch.equal(make(s), whole)
    for rows in (range(7), range(7, 12), range(3, 3), range(11, 12)):
        assert torch.equal(make(Streams(5, rows, 12, 40, ("a", 1))), whole[rows.start : rows.stop])
    index = torch.tensor([9, 2, 5])
    assert torch.equal(make(s.select(index)), whole[index])
    assert torch.equal(make(s.select(s.rows % 3 == 1)), whole[1::3])
    assert torch.equal(make(Streams(5, index, 12).at(key=("a", 1)).at(step=40)), whole[index])


@pytest.mark.parametrize("call", [c for c in CALLS if c != "bernoulli"])
def test_every_part_of_a_place_counts(call):
    """Other seeds, steps, keys (to their end, in their order, of another kind) and rows give other numbers."""
    make = CALLS[call]
    places = [Streams(seed, range(2), 4, step) for seed in (1, 2, -1, 2**63) for step in (0, 1, 2**40)]
    places += [Streams(1, range(2), 4, 0, key) for key in (("a",), ("b",), ("a", 0), ("a", 1), (0, "a"), (0,))]
    found = [make(s) for s in places]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))
    assert all(not torch.equal(rows[0], rows[1]) for rows in found)


def test_laws():
    """Kolmogorov-Smirnov and four moments over 2^18 numbers of neighbouring rows, and per row."""
    s, n = Streams(0, range(64), 64), 64 * 4096
    for dtype in (torch.float32, torch.float64):
        z, u = s.normal("a", (4096,), dtype).double(), s.uniform("a", (4096,), dtype).double()
        # standard errors of the sample moments of a standard normal: 1, 2, 15, 96 over n
        for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
            assert abs(float((z**power).mean()) - mean) < 5.0 * math.sqrt(variance / n)
        assert 0.0 <= float(u.min()) and float(u.max()) < 1.0
        p = [stats.kstest(row.numpy(), "norm").pvalue for row in z[:20]]
        p += [stats.kstest(row.numpy(), "uniform").pvalue for row in u[:20]]
        assert min(p) > 1e-3 / len(p)
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-4
        assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-4


def test_what_differs_in_anything_is_independent():
    """Neighbouring rows, steps, seeds and keys; names; and the kinds of one name, element by element and shifted."""
    n, float64 = 4096, torch.float64

    def normal(name: str = "a", rows: int = 1, **place: object) -> Tensor:
        return Streams(place.pop("seed", 3), range(rows), 32, **place).normal(name, (n,), float64)

    independent(normal(rows=32))
    independent(torch.cat([normal(step=step) for step in range(32)]))
    independent(torch.cat([normal(seed=seed) for seed in range(-8, 8)]))
    independent(torch.cat([normal(key=("a", i)) for i in range(16)]))
    independent(torch.cat([normal(name) for name in ("a", "b", "ab", "drop.a", "drop.b", "noise", "dequantize", "")]))
    s = Streams(3, range(1), 1)
    z, u = s.normal("a", (n,), float64), s.uniform("a", (n,), float64)
    score = torch.special.ndtri(u.clamp_(min=2.0**-33))
    kinds = [z, score, s.integers("a", 1001, (n,)).double() - 500.0]
    kinds += [z.reshape(2, -1).T.reshape(1, -1)]  # next to the uniforms that would be of the same bits
    kinds += [rows.roll(shift, 1) for rows in (z, score) for shift in (1, 2, n // 2)]
    independent(torch.cat(kinds))


@pytest.mark.parametrize("high", [1, 2, 3, 10, 1000], ids=str)
def test_integers_are_equally_likely(high):
    """Chi-square over all values; the p-value itself is one draw."""
    k = Streams(8, range(50), 50).integers("k", high, (1000,)).flatten()
    assert int(k.min()) >= 0 and int(k.max()) < high
    counts = torch.bincount(k, minlength=high)
    assert high == 1 or stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_bernoulli():
    """Its frequency, and both ends exactly."""
    s, n, p = Streams(2, range(40_000), 40_000), 40_000, 0.3
    assert abs(float(s.bernoulli("a", p).double().mean()) - p) < 5.0 * math.sqrt(p * (1 - p) / n)
    assert not s.bernoulli("a", 0.0).any() and s.bernoulli("a", 1.0).all()


def test_lattice():
    """Spaced evenly over the whole global batch, with one shift, uniform over steps, independent of what rows draw."""
    s = Streams(4, range(16), 16)
    t = torch.stack([s.at(step=step).lattice("t") for step in range(400)])
    assert t.min() >= 0.0 and t.max() < 1.0
    gaps = t.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 16), rtol=0, atol=1e-15)
    assert stats.kstest(t[:, 0].numpy(), "uniform").pvalue > 1e-3
    own = torch.stack([s.at(step=step).uniform("t", (), torch.float64)[0] for step in range(400)])
    independent(torch.stack([t[:, 0], s.lattice("u")[0] + own, own.roll(1)]) - 0.5)


def test_permutations():
    """Every order of four is as likely (chi-square over 24), and a long one is one."""
    assert torch.equal(permutation(1000, 3, 0).sort().values, torch.arange(1000))
    assert not torch.equal(permutation(1000, 3, 0), permutation(1000, 3, 1))
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        order = tuple(permutation(4, 9, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24 and stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_nothing_waits():
    """Made on the meta device, where a read or a copy is seen; for counted rows the streams, too."""
    with waits() as seen:
        s = Streams(1, range(4), 4, device=META).at(step=3, key=("a",))
        for call in CALLS.values():
            assert call(s).device == META
        assert not seen


def test_streams_of_another_step_are_not_compiled_again():
    """One graph for all steps and keys; the numbers are the same."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    def all_of(s: Streams) -> list[Tensor]:
        return [call(s) for call in CALLS.values()]

    compiled = torch.compile(all_of, fullgraph=True, backend=backend)
    for step in (0, 1, 10**9):
        s = Streams(2, range(3), 6, step, ("a", step))
        assert all(torch.equal(a, b) for a, b in zip(compiled(s), all_of(s), strict=True))
    assert len(graphs) == 1


@pytest.mark.gpu
def test_a_device_gives_the_same_numbers():
    """Exactly for integers and booleans, up to rounding for the others."""
    here, there = Streams(7, range(64), 64), Streams(7, range(64), 64, device="cuda")
    for call in CALLS.values():
        a, b = call(here), call(there).cpu()
        torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype != torch.bfloat16 else 2e-2, atol=1e-6)
    assert torch.equal(here.integers("a", 10**6, (100,)), there.integers("a", 10**6, (100,)).cpu())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Streams(0, torch.zeros(3), 3), "int64"),
        (lambda: Streams(0, torch.zeros(3, 1, dtype=torch.int64), 3), "shape"),
        (lambda: Streams(0, range(3), 0), "global batch"),
        (lambda: Streams(0, range(3), 3).integers("a", 0), "high"),
        (lambda: Streams(0, range(3), 3).bernoulli("a", 1.5), "p"),
    ],
    ids=["float rows", "two dimensions", "no batch", "no integers", "no probability"],
)  # fmt: skip
def test_errors(make, says):
    with pytest.raises(ValueError, match=says):
        make()
