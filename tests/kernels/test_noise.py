"""Noise: Philox's published answers, addressing by position, the normal distribution, and the kernel's equality."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import assert_close_to_twin, needs_triton, poisoned

from engine.geometry import Box
from engine.kernels.gather import Noise, gather
from engine.kernels.launch import jit, launch, tl
from engine.kernels.noise import as_word, noise_torch, philox_torch, words_at, words_torch

ONES = 0xFFFFFFFF
SEEDS = [0, 1, ONES, ONES + 1, 123_456_789_012_345, 2**64 - 1]


def test_philox_gives_the_published_answers():
    """``kat_vectors`` of Random123 (Salmon et al.): philox 4x32, 10 rounds."""
    for counter, key, expected in [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]:
        words = philox_torch(key[0] | key[1] << 32, tuple(torch.tensor([c]) for c in counter))
        assert tuple(int(w) for w in words) == expected


def reference(seed, substream, y, x, c):
    """The formula for one number, in Python integers and doubles."""
    words = [x, y, c // 4, substream]
    k0, k1 = seed & ONES, seed >> 32
    for _ in range(10):
        p0, p1 = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [(p1 >> 32) ^ words[1] ^ k0, p1 & ONES, (p0 >> 32) ^ words[3] ^ k1, p0 & ONES]
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    first, second = (((w >> 9) + 0.5) / 2**23 for w in words[c % 4 // 2 * 2 :][:2])
    function = np.sin if c % 2 else np.cos
    return np.sqrt(-2 * np.log(first)) * function(2 * np.pi * second)


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_follow_the_formula(seed):
    for y, x in [(0, 0), (65_530, 70_000), (3, 1_000_003), (2**31 - 4, 5)]:
        noise = noise_torch(seed, 65_537, Box(y, x, y + 2, x + 3), 6)
        expected = [[[reference(seed, 65_537, y + i, x + j, c) for j in range(3)] for i in range(2)] for c in range(6)]
        # Float32 near a quarter turn: the absolute error of the angle is that of 2 pi.
        np.testing.assert_allclose(noise.numpy(), expected, atol=5e-6)


@st.composite
def parts(draw, height=90, width=150):
    (y0, y1), (x0, x1) = (sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in (height, width))
    return Box(y0, x0, y1, x1)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(parts())
def test_pixel_has_the_same_noise_in_every_box(box):
    """Bit for bit: vector units must not treat the ends of a row differently from its middle."""
    whole, part = (noise_torch(7, 2, b, 3) for b in (Box(0, 0, 90, 150), box))
    assert torch.equal(part, whole[:, box.y0 : box.y1, box.x0 : box.x1])


def test_large_maps_equal_their_parts():
    """Above its grain size torch splits the work between threads."""
    box = Box(100, 65_000, 500, 65_900)
    whole = noise_torch(7, 2, box, 3)
    for part in (Box(100, 65_000, 101, 65_900), Box(499, 65_001, 500, 65_898), Box(211, 65_333, 350, 65_590)):
        rows, columns = part.relative_to(box).slices
        assert torch.equal(noise_torch(7, 2, part, 3), whole[:, rows, columns])


def test_channels_do_not_depend_on_their_number():
    box = Box(5, 6, 25, 31)
    many = noise_torch(3, 0, box, 9)
    for channels in range(1, 9):
        assert torch.equal(noise_torch(3, 0, box, channels), many[:channels])


def correlation(a, b):
    return abs(float(np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1]))


BOX = Box(0, 0, 200, 300)


def test_seeds_and_substreams_are_independent():
    base = noise_torch(1, 1, BOX, 3)
    for key in [(2, 1), (1, 2), (1 | 1 << 32, 1), (1 | 1 << 63, 1), (0, 1), (1, 0), (1, 65_536), (1, 65_537)]:
        other = noise_torch(*key, BOX, 3)
        assert (base != other).float().mean() > 0.999, key
        assert correlation(base, other) < 0.01, key


def test_channels_and_neighbours_are_independent():
    noise = noise_torch(11, 0, BOX, 8)
    for first in range(8):
        for second in range(first):
            assert correlation(noise[first], noise[second]) < 0.02
    assert correlation(noise[:, 1:], noise[:, :-1]) < 0.01
    assert correlation(noise[:, :, 1:], noise[:, :, :-1]) < 0.01
    assert correlation(noise[0, :200, :200], noise[0, :200, :200].T.contiguous()) < 0.02


@pytest.mark.parametrize("seed", [0, 123_456_789_012_345])
def test_numbers_are_normal(seed):
    values = noise_torch(seed, 4, Box(60_000, 66_000, 60_600, 66_600), 3).double()
    n = values.numel()
    assert bool(torch.isfinite(values).all())
    assert abs(float(values.mean())) < 4 / n**0.5
    assert abs(float(values.std()) - 1) < 4 / (2 * n) ** 0.5
    assert abs(float((values**3).mean())) < 4 * (15 / n) ** 0.5
    assert abs(float((values**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    # Kolmogorov-Smirnov at 0.1 %: the whole distribution, not its moments alone.
    ordered = values.flatten().sort().values
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert float((torch.special.ndtr(ordered) - steps).abs().max()) < 1.95 / n**0.5


def test_shape_and_dtype():
    noise = noise_torch(0, 0, Box(4, 5, 6, 8), 3)
    assert noise.shape == (3, 2, 3)
    assert noise.dtype == torch.float32
    assert noise_torch(0, 0, Box(4, 5, 4, 8), 3).shape == (3, 0, 3)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(-(2**63), 2**64) | st.sampled_from([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32]))
def test_word_keeps_its_low_bits(value):
    word = as_word(value)
    assert -(2**31) <= word < 2**31
    assert word % 2**32 == value % 2**32


@jit()
def words_kernel(
    target: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    substream: tl.tensor,
    y0: tl.tensor,
    x0: tl.tensor,
    height: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Store the words of the second group of channels, [4, height, width]."""
    row, column = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    pixel, valid = target + row * width + column, (row < height) & (column < width)
    r0, r1, r2, r3 = words_at(y0 + row, x0 + column, 1, substream, k0, k1)
    tl.store(pixel, r0, mask=valid)
    tl.store(pixel + height * width, r1, mask=valid)
    tl.store(pixel + 2 * height * width, r2, mask=valid)
    tl.store(pixel + 3 * height * width, r3, mask=valid)


@needs_triton
@pytest.mark.parametrize("seed", SEEDS)
def test_kernel_has_the_twins_words(seed):
    for box in (Box(0, 0, 1, 1), Box(3, 70_001, 40, 70_070), Box(2**31 - 4, 5, 2**31 + 9, 300)):
        target = poisoned((4, *box.shape), torch.int32)
        scalars = (as_word(n) for n in (seed, seed >> 32, 65_537, box.y0, box.x0))
        launch(words_kernel, (1,), target, *scalars, height=box.height, width=box.width, block=512)
        rows, columns = torch.arange(box.y0, box.y1), torch.arange(box.x0, box.x1)
        assert torch.equal(target.long() & ONES, torch.stack(words_torch(seed, 65_537, rows, columns, 1)))


@needs_triton
def test_kernel_is_as_exact_as_the_twin():
    box = Box(0, 0, 200, 256)
    words = words_torch(1, 2, torch.arange(200), torch.arange(256), 0)
    u, v = (((w >> 9).double() + 0.5) / 2**23 for w in words[:2])
    exact = torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * np.pi * v)
    black = torch.zeros(1, *box.shape)
    result = gather(black, box, box, box.shape, Noise(1.0, 1, 2), use_triton=True)[0]
    assert_close_to_twin(result, noise_torch(1, 2, box, 1), exact=exact, factor=1.2)
