"""Gather: the border rule is PyTorch's reflection of the whole image, with its noise."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.geometry import Box
from engine.kernels.gather import gather_torch, reflect
from engine.kernels.noise import noise_torch


def positions(start, stop):
    return list(range(start, stop))


@pytest.mark.parametrize("size", [2, 3, 8, 9, 31])
def test_reflect_is_torchs_reflection(size):
    pad = size - 1  # the most that torch allows
    padded = F.pad(torch.arange(float(size))[None, None], (pad, pad), mode="reflect")[0, 0]
    assert reflect(-pad, size + pad, size) == [int(p) for p in padded]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_reflect_goes_on_for_frames_smaller_than_the_padding(size):
    """A 3-pixel image in a window of 8: reflected again and again, as numpy does and torch refuses to."""
    expected = np.pad(np.arange(size), (0, 16 - size), mode="reflect").tolist()
    assert reflect(0, 16, size) == expected


def test_reflect_of_a_single_pixel_repeats_it():
    assert reflect(0, 8, 1) == [0] * 8


def test_positions_inside_are_themselves():
    assert reflect(3, 9, 20) == positions(3, 9)


@pytest.mark.parametrize(("height", "width"), [(13, 21), (16, 24), (9, 15), (7, 5)])
def test_tiles_of_the_padded_frame(height, width, picture):
    """With noise, which the reference adds before it pads: the reflected pixels carry the reflected noise."""
    image, sigma = picture(height, width), 0.1
    noise = noise_torch(5, 1, Box(0, 0, height, width), 3)
    pad = (0, -width % 8, 0, -height % 8)
    whole = F.pad((image + sigma * noise)[None], pad, mode="reflect")
    for y in range(0, whole.shape[2], 8):
        for x in range(0, whole.shape[3], 8):
            rows, columns = reflect(y, y + 8, height), reflect(x, x + 8, width)
            top, left = min(rows), min(columns)
            block = Box(top, left, max(rows) + 1, max(columns) + 1)
            tile = gather_torch(
                image[:, block.y0 : block.y1, block.x0 : block.x1],
                [r - top for r in rows],
                [c - left for c in columns],
                noise_torch(5, 1, block, 3),
                sigma,
                "cpu",
            )
            assert torch.equal(tile, whole[:, :, y : y + 8, x : x + 8])


def test_output_is_a_channels_last_batch_of_one(picture):
    tile = gather_torch(picture(5, 6), positions(0, 5), positions(0, 6), None, 0.0, "cpu")
    assert tile.shape == (1, 3, 5, 6)
    assert tile.dtype == torch.float32
    assert tile.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_clipped_before_the_network(picture):
    tile = gather_torch(picture(40, 40), positions(0, 40), positions(0, 40), torch.full((3, 40, 40), 9.0), 0.5, "cpu")
    assert float(tile.min()) >= 4.5


def test_the_block_is_left_as_it_was(picture):
    block = picture(9, 9)
    before = block.clone()
    gather_torch(block, reflect(0, 16, 9), reflect(0, 16, 9), torch.ones(3, 9, 9), 0.1, "cpu").zero_()
    assert torch.equal(block, before)


@pytest.mark.parametrize("noise", [None, torch.ones(3, 4, 4)])
def test_without_sigma_there_is_no_noise(noise, picture):
    block = picture(4, 4)
    tile = gather_torch(block, positions(0, 4), positions(0, 4), noise, 0.0, "cpu")
    assert torch.equal(tile[0], block)
