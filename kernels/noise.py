"""noise: standard normal numbers addressed by position.

The number at (seed, substream, y, x, c) is a pure function of these five integers. Overlapping tiles therefore see the
same noise, and neither the size of the tiles, nor their order, nor the canvas changes it. Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = seed and counter = (x, y, c // 4, substream) gives four
words; the Box-Muller transform makes four normals of them, and channel c takes number c % 4.

Has no launcher of its own: ``gather`` computes the numbers in the pass that needs them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.geometry import Box
from engine.kernels.launch import jit, tl

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox_torch(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of a 64-bit ``seed`` and four int64 tensors of one shape that hold uint32 values."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all 64 bits; the mask undoes the sign of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """uint32 -> the open interval (0, 1), exactly representable in float32."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def words_torch(seed: int, substream: int, rows: Tensor, columns: Tensor, group: int) -> tuple[Tensor, ...]:
    """The four words for channels 4 group to 4 group + 3 at ``rows`` x ``columns`` (int64 [h], [w]).

    Returns four int64 tensors [h, w] that hold uint32 values.
    """
    shape = (len(rows), len(columns))
    x, y = columns.expand(shape), rows[:, None].expand(shape)
    return philox_torch(seed, (x, y, torch.full_like(x, group), torch.full_like(x, substream)))


def noise_at_torch(seed: int, substream: int, rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Standard normal numbers at ``rows`` x ``columns`` (int64 [h], [w]), which need not be adjacent.

    ``substream`` separates the uses of one seed (scales of step 1, super-resolution steps). Returns float32 [C, h, w].
    """
    result = torch.empty(channels, len(rows), len(columns), device=rows.device)
    # Four channels at a time: the words are int64 here and would take more memory than the normals.
    for group in range(-(-channels // 4)):
        words = words_torch(seed, substream, rows, columns, group)
        normals = []
        for first, second in (words[:2], words[2:]):
            radius = torch.sqrt(-2.0 * torch.log(_uniform(first)))
            angle = 2.0 * math.pi * _uniform(second)
            normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
        for target, values in zip(result[4 * group :], normals, strict=False):
            target.copy_(values)
    return result


def noise_torch(seed: int, substream: int, box: Box, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers of the pixels of ``box``, float32 [C, h, w]."""
    rows, columns = torch.arange(box.y0, box.y1, device=device), torch.arange(box.x0, box.x1, device=device)
    return noise_at_torch(seed, substream, rows, columns, channels)


@jit()
def _philox(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """``philox_torch`` of uint32: counters of one shape or scalar, a key of two words."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high2, low2 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit()
def _cos_sin(angle: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(cosine, sine) of float32 in [0, 2 pi]: Taylor series within an eighth of a turn, to float32's last place.

    The library's functions take angles of any size, for which they put a table on the stack.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in three parts; the first is so short that its multiples are exact.
    r = angle - quarter * 1.5703125
    r = r - quarter * 4.837512969970703e-4
    r = r - quarter * 7.549789948768648e-8
    z = r * r
    s = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    c = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    odd = (quarter == 1.0) | (quarter == 3.0)
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where((quarter == 1.0) | (quarter == 2.0), -cosine, cosine)
    sine = tl.where((quarter == 2.0) | (quarter == 3.0), -sine, sine)
    return cosine, sine


@jit()
def _box_muller(first: tl.tensor, second: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Two words (uint32) -> two standard normal numbers, in the definition's float32 steps."""
    u = ((first >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    v = ((second >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    cosine, sine = _cos_sin(6.283185307179586 * v)
    return radius * cosine, radius * sine


@jit()
def words_at(
    y: tl.tensor, x: tl.tensor, group: tl.tensor, substream: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """``words_torch`` at ``y`` [h, 1] and ``x`` [1, w], as uint32; all arguments are int32 (see ``as_word``)."""
    zero = (y * 0 + x * 0).to(tl.uint32)
    c0, c1 = zero + x.to(tl.uint32, bitcast=True), zero + y.to(tl.uint32, bitcast=True)
    c2, c3 = zero + group, zero + substream.to(tl.uint32, bitcast=True)
    r0, r1, r2, r3 = _philox(c0, c1, c2, c3, k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True))
    return r0, r1, r2, r3


@jit()
def normals_at(
    y: tl.tensor, x: tl.tensor, group: tl.tensor, substream: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Normals of channels 4 group to 4 group + 3 at ``y`` [h, 1] and ``x`` [1, w]; arguments as for ``words_at``."""
    n0, n1, n2, n3 = words_at(y, x, group, substream, k0, k1)
    n0, n1 = _box_muller(n0, n1)
    n2, n3 = _box_muller(n2, n3)
    return n0, n1, n2, n3


def as_word(value: int) -> int:
    """Low 32 bits as a signed number, so that every launch has the same types whatever the value."""
    return (value & _MASK) - ((value & 0x80000000) << 1)
