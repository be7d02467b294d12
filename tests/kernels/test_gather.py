"""Gather: the border rule is the reflection of the whole image with its noise, and the kernel equals its twin."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import BOTH, assert_close_to_twin, layouts, needs_triton, poisoned
from torch.nn import functional as F

from engine.geometry import Box
from engine.kernels.gather import Noise, gather, gather_torch, reflect
from engine.kernels.noise import noise_torch

NOISE = Noise(0.1, 5, 65_537)
NOISES = pytest.mark.parametrize(
    "noise", [None, NOISE, NOISE._replace(channels=6)], ids=["no noise", "noise", "noise channels"]
)

# One unit in the last place near 1; Triton's interpreter cuts bfloat16 off where a GPU rounds.
ATOL = {torch.float32: 2e-7, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 100))
def test_reflect_is_numpys_reflection(size, before, after):
    """Again and again for an image that is smaller than its padding; a single pixel is repeated."""
    expected = np.pad(np.arange(size), (before, after), mode="reflect").tolist()
    assert reflect(-before, size + after, size) == expected


def test_reflect_is_torchs_reflection():
    for size in (2, 3, 8, 9, 31):
        pad = size - 1  # torch's limit
        padded = F.pad(torch.arange(float(size))[None, None], (pad, pad), mode="reflect")[0, 0]
        assert reflect(-pad, size + pad, size) == [int(p) for p in padded]


@pytest.mark.parametrize(("height", "width"), [(13, 21), (16, 24), (7, 5)])
def test_tiles_of_the_padded_frame(height, width, picture):
    """With noise, which the reference adds before it pads: the reflected pixels have the reflected noise."""
    image, noise = picture(height, width), Noise(0.1, 5, 1)
    normals = noise_torch(5, 1, Box(0, 0, height, width), 3)
    pad = (0, -width % 8, 0, -height % 8)
    whole = F.pad((image + noise.sigma * normals)[None], pad, mode="reflect")
    for y in range(0, whole.shape[2], 8):
        for x in range(0, whole.shape[3], 8):
            rows, columns = reflect(y, y + 8, height), reflect(x, x + 8, width)
            box, read = Box(min(rows), min(columns), max(rows) + 1, max(columns) + 1), Box(y, x, y + 8, x + 8)
            tile = gather_torch(image[(slice(None), *box.slices)], box, read, (height, width), noise)
            assert torch.equal(tile, whole[(..., *read.slices)])


def test_output_is_a_channels_last_batch_of_one(picture):
    frame = Box(0, 0, 5, 6)
    tile = gather_torch(picture(5, 6), frame, frame, frame.shape)
    assert tile.shape == (1, 3, 5, 6)
    assert tile.dtype == torch.float32
    assert tile.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_clipped_before_the_network(picture):
    frame = Box(0, 0, 40, 40)
    tile = gather_torch(picture(40, 40) - 0.5, frame, frame, frame.shape, Noise(0.5, 1, 0))
    assert float(tile.min()) < -1
    assert float(tile.max()) > 1.3


def test_block_is_not_changed(picture):
    block, frame = picture(9, 9), Box(0, 0, 9, 9)
    before = block.clone()
    for read, noise in ((Box(0, 0, 16, 16), Noise(0.1, 1, 0)), (Box(0, 0, 16, 16), None), (frame, None)):
        gather_torch(block, frame, read, (9, 9), noise).zero_()
        assert torch.equal(block, before)


def test_without_sigma_there_is_no_noise(picture):
    block, frame = picture(4, 4), Box(0, 0, 4, 4)
    for noise in (None, Noise(0.0, 1, 0)):
        assert torch.equal(gather_torch(block, frame, frame, frame.shape, noise)[0], block)


def pixels(dtype, height, width, channels=3):
    values = torch.rand(channels, height, width)
    return (values * 255).to(dtype) if dtype == torch.uint8 else values.to(dtype)


def padded_crop(image, read, noise):
    """``read`` of numpy's padding of the whole image with its noise: independent of gather."""
    image = image.float() / 255
    _, height, width = image.shape
    if noise:
        normals = noise_torch(noise.seed, noise.substream, Box(0, 0, height, width), len(image) + noise.channels)
        image = torch.cat([image + noise.sigma * normals[: len(image)], normals[len(image) :]])
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (40, 40), (40, 40)), mode="reflect"))
    rows, columns = read.shift(40, 40).slices
    return padded[None, :, rows, columns]


SIZE = (37, 45)
READS = [  # tile, block
    (Box(3, 5, 20, 30), Box(2, 1, 25, 33)),  # inside
    (Box(16, 24, 40, 48), Box(10, 20, 37, 45)),  # past the right and the bottom
    (Box(0, 0, 48, 56), Box(0, 0, 37, 45)),  # the whole frame
]


@NOISES
def test_tile_is_a_part_of_the_padded_image(noise):
    image = pixels(torch.uint8, *SIZE)
    for read, box in READS:
        tile = gather_torch(image[(slice(None), *box.slices)], box, read, SIZE, noise)
        assert torch.equal(tile, padded_crop(image, read, noise))


@needs_triton
@NOISES
def test_kernel_has_the_border_rule(noise):
    image = pixels(torch.float32, *SIZE)
    # Normals are equal to about 1e-6; the image gets a tenth of one.
    atol = 0.0 if noise is None else 1e-6 if noise.channels else 2e-7
    for read, box in READS:
        block = image[(slice(None), *box.slices)]
        tile = gather(block, box, read, SIZE, noise, use_triton=True)
        assert_close_to_twin(tile, gather_torch(block, box, read, SIZE, noise), atol=atol)


@needs_triton
@pytest.mark.parametrize("target", ATOL, ids=str)
def test_kernel_takes_every_dtype_and_layout(target):
    read, box = Box(8, 16, 40, 48), Box(5, 11, 37, 45)
    for source in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        image = pixels(source, 32, 34)
        twin = gather_torch(image, box, read, SIZE, NOISE, dtype=target)
        for _, block in layouts(image):
            tile = gather(block, box, read, SIZE, NOISE, dtype=target, use_triton=True)
            assert_close_to_twin(tile, twin, atol=ATOL[target])
            assert tile.is_contiguous(memory_format=torch.channels_last)


@needs_triton
def test_kernel_takes_odd_shapes():
    for height, width in [(1, 1), (5, 1), (1, 9), (2, 300)]:
        for channels in (1, 2, 4, 6):
            block, frame = pixels(torch.uint8, height, width, channels), Box(0, 0, height, width)
            read = Box(0, 0, height + 7, width + 3)
            tile = gather(block, frame, read, (height, width), NOISE, use_triton=True)
            assert_close_to_twin(tile, gather_torch(block, frame, read, (height, width), NOISE), atol=2e-7)


@needs_triton
def test_kernel_takes_far_positions():
    """A block that lies deep in a large image, with the largest seed and two groups of channels."""
    box, size = Box(3, 70_001, 40, 70_070), (100, 80_000)
    noise = Noise(1.0, 2**64 - 1, 65_536, 4)
    block = torch.zeros(2, *box.shape)
    tile = gather(block, box, box, size, noise, use_triton=True)
    assert_close_to_twin(tile, gather_torch(block, box, box, size, noise), atol=1e-6)


@BOTH
def test_noise_repeats(use_triton):
    """The window begins above and left of the first pixel, and is wider than two periods; the other axis goes on."""
    box, noise = Box(0, 0, 9, 25), Noise(1.0, 7, 3, 2, period=(0, 11), start=(0, -4))
    tile = gather(torch.zeros(3, 9, 25), box, box, box.shape, noise, use_triton=use_triton)[0]
    expected = noise_torch(7, 3, Box(0, 0, 9, 11), 5)[:, :, torch.arange(-4, 21) % 11]
    torch.testing.assert_close(tile, expected, atol=2e-6, rtol=0)
    both = noise._replace(period=(4, 11), start=(-3, -4))
    tile = gather(torch.zeros(3, 9, 25), box, box, box.shape, both, use_triton=use_triton)[0]
    torch.testing.assert_close(tile, expected[:, torch.arange(-3, 6) % 4], atol=2e-6, rtol=0)


@needs_triton
def test_kernels_blocks_fit_together(small_blocks):
    block, frame, read = pixels(torch.uint8, *SIZE), Box(0, 0, *SIZE), Box(24, 8, 48, 56)
    noise = NOISE._replace(channels=6)
    tile = gather(block, frame, read, SIZE, noise, use_triton=True)
    assert_close_to_twin(tile, gather_torch(block, frame, read, SIZE, noise), atol=1e-6)


@BOTH
def test_noise_channels_without_noise_in_the_image(use_triton):
    block, frame = pixels(torch.uint8, 9, 11), Box(0, 0, 9, 11)
    tile = gather(block, frame, frame, (9, 11), Noise(0.0, 7, 3, 2), use_triton=use_triton)[0]
    assert torch.equal(tile[:3], block / 255)
    torch.testing.assert_close(tile[3:], noise_torch(7, 3, frame, 5)[3:], atol=2e-6, rtol=0)


@BOTH
def test_tile_goes_into_its_place_of_a_batch(use_triton):
    block, frame = pixels(torch.uint8, 9, 11), Box(0, 0, 9, 11)
    batch = poisoned((3, 3, 16, 16), memory_format=torch.channels_last)
    read = Box(0, 0, 16, 16)
    result = gather(block, frame, read, (9, 11), NOISE, out=batch[1:2], use_triton=use_triton)
    assert result.data_ptr() == batch[1].data_ptr()
    torch.testing.assert_close(batch[1:2], gather_torch(block, frame, read, (9, 11), NOISE), atol=2e-7, rtol=0)
    assert batch[0].isnan().all()
    assert batch[2].isnan().all()


@BOTH
def test_refusals(use_triton):
    block, frame = pixels(torch.uint8, 9, 11), Box(0, 0, 9, 11)
    for tensor, box, read, message in [
        (block, Box(0, 0, 9, 10), Box(0, 0, 9, 9), "not the pixels of"),
        (block, Box(1, 0, 10, 11), frame, "needs a row"),
        (block, frame, Box(0, 0, 9, 12), "needs a column"),
        (block.int(), frame, frame, "neither uint8 nor float"),
    ]:
        with pytest.raises(ValueError, match=message):
            gather(tensor, box, read, (20, 20), use_triton=use_triton)
    with pytest.raises(ValueError, match="channels-last"):
        gather(block, frame, frame, (20, 20), out=torch.empty(1, 3, 9, 11), use_triton=use_triton)
