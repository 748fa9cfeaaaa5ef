"""The counter-based core: published known answers, and numbers that depend on their place alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from solvers import counter

MAKE = {
    "normals": counter.normals,
    "uniforms": counter.uniforms,
    "integers": lambda lanes, n, dtype: counter.integers(lanes, n, 1000),
}


def test_splitmix64():
    """The first numbers of the published generator from the seed 1234567, on Python ints and on tensors."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [counter.mix(1234567 + j * counter.WEYL) for j in range(5)] == known
    found = counter.words(torch.tensor([1234567, 0]), 5)
    assert [z % 2**64 for z in found[0].tolist()] == known
    assert [z % 2**64 for z in found[1].tolist()] == [counter.mix(j * counter.WEYL) for j in range(5)]


def test_words_of_text():
    """FNV-1a's published test vectors."""
    known = {"": 0xCBF29CE484222325, "a": 0xAF63DC4C8601EC8C, "foobar": 0x85944171F73967E8}
    assert {text: counter.word(text) for text in known} == known


def test_hashes_read_every_part():
    """In its order, with the bits of a negative number, and to the end of a word."""
    parts = [(), (0,), (0, 0), (1, 2), (2, 1), (-1,), (1,), (2**63,), ("a",), ("a", 0), ("ab",), ("a", "b")]
    assert len({counter.hashed(*p) for p in parts}) == len(parts)
    assert counter.hashed(-1) == counter.hashed(2**64 - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_are_made_of_the_bits_as_described(dtype):
    """Box-Muller of the two halves of a word, as Python's floats have it; uniforms are the halves' upper bits."""
    lane = 0x0123456789ABCDEF
    bits = [counter.mix(lane + j * counter.WEYL) for j in range(3)]
    low, high = ([(z >> shift) % 2**32 for z in bits] for shift in (0, 32))
    as_signed = [[h - 2**32 if h >= 2**31 else h for h in part] for part in (low, high)]
    radius = [math.sqrt(-2.0 * math.log(max(h / 2**32 + 0.5, 2.0**-33))) for h in as_signed[0]]
    angle = [2.0 * math.pi * h / 2**32 for h in as_signed[1]]
    z = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    z += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    found = counter.normals(torch.tensor([lane]), 6, dtype)[0]
    # float32 rounds 1/2 + h to 2^-25; the logarithm and a square root of something of order one pass that on
    tol = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), torch.tensor(z, dtype=torch.float64), rtol=tol, atol=tol)
    kept = 32 if dtype == torch.float64 else 24
    shifted = [(h + 2**31) % 2**32 >> 32 - kept for pair in zip(low, high, strict=True) for h in pair]
    u = counter.uniforms(torch.tensor([lane]), 6, dtype)[0]
    assert u.tolist() == [h * 2.0**-kept for h in shifted]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("n", [1, 5, 3072, 2**16 + 3], ids=str)
def test_numbers_do_not_depend_on_how_they_are_made(kind, n, monkeypatch):
    """Bitwise: all lanes at once or each alone, in pieces of any size, in one thread or in two."""
    lanes, make = counter.mix_tensor(torch.arange(15)), MAKE[kind]
    whole = make(lanes, n, torch.float32)
    assert whole.shape == (15, n)
    for some in (slice(0, 1), slice(3, 10), [11, 2]):
        assert torch.equal(make(lanes[some], n, torch.float32), whole[some])
    assert torch.equal(make(lanes.reshape(3, 5), n, torch.float32), whole.reshape(3, 5, n))
    for piece in (37 if n < 10_000 else 5001, 2**23):
        monkeypatch.setitem(counter._PIECES, "cpu", piece)
        assert torch.equal(make(lanes, n, torch.float32), whole)
    torch.set_num_threads(2)
    try:
        assert torch.equal(make(lanes, n, torch.float32), whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(3000, 300), (3, 300_000)], ids=["many lanes", "long lanes"])
@pytest.mark.parametrize("kind", ["normals", "uniforms"])
def test_memory_is_bounded(kind, shape):
    """Beside the result, the lanes and the places, no tensor is larger than a piece (two numbers a word)."""
    sizes: dict[int, int] = {}  # words of a storage by its address

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes() // 8
            return out

    lanes = torch.arange(shape[0])
    with Sizes():
        MAKE[kind](lanes, shape[1], torch.float32)
    result, places = shape[0] * shape[1] // 2, shape[1] // 2
    assert sorted(sizes.values())[-1] == result
    assert max(size for size in sizes.values() if size not in (result, places)) <= counter._PIECES["cpu"]
    assert list(sizes.values()).count(result) == 1


def test_integers_are_as_likely_where_bits_do_not_divide():
    """Thirds of 3 * 2^30, where 32 bits modulo the same number would take the first third twice as often."""
    n, high = 30_000, 3 * 2**30
    k = counter.integers(torch.tensor([7]), n, high)[0]
    assert int(k.min()) >= 0 and int(k.max()) < high
    thirds = torch.bincount(k // 2**30, minlength=3).double() / n
    assert float((thirds - 1 / 3).abs().max()) < 5 * math.sqrt(2 / 9 / n)
