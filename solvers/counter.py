r"""Random numbers as functions of their place: counters in, bits out, with no state that runs on.

Bits are the finalizer of splitmix64 (Steele, Lea and Flood 2014) over Weyl sequences: row i has a 64-bit *lane*, and
word j of it is ``mix(lane_i + j * WEYL)``, on Python ints and on int64 tensors, which wrap around, alike. So a number
depends on its lane and its place alone: not on the batch, the device, the threads, or what was drawn before. Nothing
here waits for a device, and all of it compiles.

In float32 a uniform has 24 bits, as torch's own, and a normal (Box and Muller 1958) reaches to 6.0 standard deviations;
in float64 32 bits and 6.7. Lanes are 64 bits: among N of n words each, N^2 n / 2^64 pairs are expected to overlap
somewhere, which nothing here prevents and no statistic of any use sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WEYL, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = ((30, MASK >> 30, _M1), (27, MASK >> 27, _M2), (31, MASK >> 31, None))
_PIECES = {"cpu": 2**15}
"""Words that are mixed at a time, so that temporaries stay in a CPU's cache; a bound on their memory elsewhere."""
_PIECE = 2**23


# --- hashes on the host ---------------------------------------------------------------------------------------------


def mix(z: int) -> int:
    """The finalizer of splitmix64: a bijection of 64-bit integers whose neighbours become unrelated."""
    z = (z + WEYL) & MASK
    z = ((z ^ (z >> 30)) * _M1) & MASK
    z = ((z ^ (z >> 27)) * _M2) & MASK
    return z ^ (z >> 31)


def signed(z: int) -> int:
    """64 bits as the int64 of the same bits."""
    z &= MASK
    return z - (1 << 64) if z >> 63 else z


def word(text: str) -> int:
    """64 bits of a text (FNV-1a)."""
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def hashed(*parts: int | str) -> int:
    """64 bits of integers, of which the low 64 bits count, and words, in their order."""
    state = 0
    for part in parts:
        state = mix(state ^ (word(part) if isinstance(part, str) else part & MASK))
    return state


_WORDS = {text: word(text) for text in ("interval", "tree", "leaf", "corrector", "fork", "uniform")}


def key(text: str, *values: Any) -> int | Tensor:
    """An int64 hash of a word and real numbers; a (B,) tensor if a number is one per sample.

    Plain integer arithmetic, which a compiler can follow.
    """
    found: int | Tensor = _WORDS.get(text) or word(text)
    for value in values:
        if isinstance(value, Tensor):
            mantissa, exponent = torch.frexp(value.reshape(-1).double())
            whole = (mantissa * 2.0**53).long()
            found = mix_tensor((signed(found) if isinstance(found, int) else found) ^ whole)
            found = mix_tensor(found ^ exponent.long())
            continue
        number = float(value)
        if math.isinf(number):
            parts = (1 if number > 0 else -1, 4096)
        else:
            share, power = math.frexp(number)
            parts = (int(share * 2.0**53), power)
        for part in parts:
            found = mix(found ^ (part & MASK)) if isinstance(found, int) else mix_tensor(found ^ part)
    return signed(found) if isinstance(found, int) else found


# --- numbers on the device ------------------------------------------------------------------------------------------


def mix_tensor(z: Tensor) -> Tensor:
    """`mix` of int64 tensors."""
    z = z + signed(WEYL)
    for shift, mask, factor in _ROUNDS:
        z ^= (z >> shift).bitwise_and_(mask)  # a logical shift: int64's own carries the sign along
        if factor is not None:
            z *= signed(factor)
    return z


def lanes_of(seeds: Sequence[int], device: torch.device) -> Tensor:
    """The mixed seeds, int64 (B,). A regular sequence, such as a range, is counted on the device: a list would be
    copied there, which waits for it and is refused while a CUDA graph is captured."""
    step = seeds[1] - seeds[0] if len(seeds) > 1 else 0
    if all(seeds[i + 1] - seeds[i] == step for i in range(len(seeds) - 1)):
        places = torch.arange(len(seeds), dtype=torch.int64, device=device)
        return mix_tensor(places * signed(step) + signed(seeds[0]))
    return torch.tensor([signed(mix(s)) for s in seeds], dtype=torch.int64).to(device)


def places(count: int, device: torch.device) -> Tensor:
    """Where words 0 … count - 1 of a lane are: multiples of WEYL, int64 (count,)."""
    return torch.arange(count, dtype=torch.int64, device=device) * signed(WEYL)


def words(lanes: Tensor, count: int) -> Tensor:
    """(*lanes.shape, count) words of 64 bits, int64."""
    return mix_tensor(lanes[..., None] + places(count, lanes.device))


def normals(lanes: Tensor, n: int, dtype: torch.dtype, at: Tensor | None = None) -> Tensor:
    """(*lanes.shape, n) standard normals: the two of word j are numbers j and j + (n + 1) // 2 of a lane.

    Args:
        lanes: int64, any shape.
        n: numbers per lane.
        dtype: of the result; other than float64 they are made in float32.
        at: `places` of (n + 1) // 2 words, for a caller who keeps them.
    """
    double = dtype == torch.float64
    floor = 2.0**-33 if double else 2.0**-26  # half the smallest step, instead of log 0

    def write(bits: Tensor, out: Tensor) -> None:
        # both halves of every word at once, as signed integers: uniform on [-1/2, 1/2)
        halves = bits.view(torch.int32).to(torch.float64 if double else torch.float32).mul_(2.0**-32)
        halves = halves.reshape(*bits.shape, 2)
        radius = (halves[..., 0] + 0.5).clamp_(min=floor).log_().mul_(-2.0).sqrt_()
        angle = halves[..., 1] * (2.0 * math.pi)
        out[..., 0] = angle.cos().mul_(radius)
        out[..., 1] = angle.sin_().mul_(radius)

    half = (n + 1) // 2
    out = lanes.new_empty((lanes.numel(), 2, half), dtype=dtype)
    _write(write, lanes, at, out.transpose(1, 2))
    return _first(out, lanes, n)


def uniforms(lanes: Tensor, n: int, dtype: torch.dtype, at: Tensor | None = None) -> Tensor:
    """(*lanes.shape, n) uniforms on [0, 1): both halves of every word, 32 bits each, of which the upper ones that the
    dtype holds are kept (24 in float32, 11 in float16), so that none is rounded up to 1. Arguments as `normals`."""
    kept = min(32, 1 - int(math.log2(torch.finfo(dtype).eps)))
    wide = torch.promote_types(dtype, torch.float32)

    def write(bits: Tensor, out: Tensor) -> None:
        halves = bits.view(torch.int32)
        if kept < 32:
            halves = halves >> 32 - kept
        out.copy_(halves.to(wide).add_(2.0 ** (kept - 1)).mul_(2.0**-kept).reshape(out.shape))

    out = lanes.new_empty((lanes.numel(), (n + 1) // 2, 2), dtype=dtype)
    _write(write, lanes, at, out)
    return _first(out, lanes, n)


def integers(lanes: Tensor, n: int, high: int) -> Tensor:
    """(*lanes.shape, n) integers of 0 … high - 1, int64: 63 bits modulo `high`, so that no two probabilities differ by
    more than a share of high / 2^63."""
    return words(lanes, n).bitwise_right_shift_(1).bitwise_and_(MASK >> 1).remainder_(high)


def permutation(n: int, lane: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of the n first words of a lane, int64 (n,): a random permutation. (No two words are equal.)"""
    return torch.argsort(mix_tensor(places(n, torch.device(device)) + signed(lane)))


def _write(write: Callable[[Tensor, Tensor], None], lanes: Tensor, at: Tensor | None, out: Tensor) -> None:
    """Writes what is made of every word into out, (lanes, words, 2), a bounded number of words at a time."""
    flat, (rows, count) = lanes.reshape(-1, 1), out.shape[:2]
    if at is None:
        at = places(count, lanes.device)
    most = _PIECES.get(lanes.device.type, _PIECE)
    if rows * count <= most or torch.compiler.is_compiling():  # a compiler makes its own loop
        write(mix_tensor(flat + at), out)
        return
    deep, wide = max(1, most // count), min(count, most)
    for i in range(0, rows, deep):
        for j in range(0, count, wide):
            write(mix_tensor(flat[i : i + deep] + at[j : j + wide]), out[i : i + deep, j : j + wide])


def _first(out: Tensor, lanes: Tensor, n: int) -> Tensor:
    flat = out.reshape(*lanes.shape, n + n % 2)
    return flat if flat.shape[-1] == n else flat[..., :n]
