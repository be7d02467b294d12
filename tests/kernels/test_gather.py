"""Gather: the border rule is PyTorch's reflection of the whole image, with its noise."""

import numpy as np
import pytest
import torch
from support.kernels import assert_close_to_twin, layouts, needs_triton, poisoned
from torch.nn import functional as F

from engine.geometry import Box
from engine.kernels.gather import Noise, gather, gather_torch, reflect
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
    image, noise = picture(height, width), Noise(0.1, 5, 1)
    normals = noise_torch(5, 1, Box(0, 0, height, width), 3)
    pad = (0, -width % 8, 0, -height % 8)
    whole = F.pad((image + noise.sigma * normals)[None], pad, mode="reflect")
    for y in range(0, whole.shape[2], 8):
        for x in range(0, whole.shape[3], 8):
            rows, columns = reflect(y, y + 8, height), reflect(x, x + 8, width)
            inside, read = Box(min(rows), min(columns), max(rows) + 1, max(columns) + 1), Box(y, x, y + 8, x + 8)
            tile = gather_torch(image[(slice(None), *inside.slices)], inside, read, (height, width), noise)
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


def test_the_block_is_left_as_it_was(picture):
    block, frame = picture(9, 9), Box(0, 0, 9, 9)
    before = block.clone()
    for read, noise in ((Box(0, 0, 16, 16), Noise(0.1, 1, 0)), (Box(0, 0, 16, 16), None), (frame, None)):
        gather_torch(block, frame, read, (9, 9), noise).zero_()
        assert torch.equal(block, before)


@pytest.mark.parametrize("noise", [None, Noise(0.0, 1, 0)])
def test_without_sigma_there_is_no_noise(noise, picture):
    block, frame = picture(4, 4), Box(0, 0, 4, 4)
    tile = gather_torch(block, frame, frame, frame.shape, noise)
    assert torch.equal(tile[0], block)


NOISE = Noise(0.1, 5, 65_537)
NOISES = pytest.mark.parametrize(
    "noise", [None, NOISE, NOISE._replace(channels=6)], ids=["no noise", "noise", "noise channels"]
)
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]

# What one unit in the last place is worth near 1; Triton's interpreter cuts bfloat16 off where a GPU rounds.
ATOL = {torch.float32: 2e-7, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def pixels(dtype, height, width, channels=3):
    values = torch.rand(channels, height, width)
    return (values * 255).to(dtype) if dtype == torch.uint8 else values.to(dtype)


def whole(image, read, noise):
    """By numpy's padding of the whole image with its noise, cut: nothing of gather's own."""
    image = image.float() / 255
    _, height, width = image.shape
    if noise:
        normals = noise_torch(noise.seed, noise.substream, Box(0, 0, height, width), len(image) + noise.channels)
        image = torch.cat([image + noise.sigma * normals[: len(image)], normals[len(image) :]])
    pad = ((0, 0), (40, 40), (40, 40))
    padded = torch.from_numpy(np.pad(image.numpy(), pad, mode="reflect"))
    rows, columns = read.shift(40, 40).slices
    return padded[None, :, rows, columns]


READS = {
    "inside": (Box(3, 5, 20, 30), Box(2, 1, 25, 33)),
    "past the right and bottom": (Box(16, 24, 40, 48), Box(10, 20, 37, 45)),
    "all of it and more": (Box(0, 0, 48, 56), Box(0, 0, 37, 45)),
}


def block_of(image, inside):
    return image[(slice(None), *inside.slices)]


@NOISES
@pytest.mark.parametrize("case", READS)
def test_a_tile_is_a_part_of_the_padded_image(case, noise):
    read, inside = READS[case]
    image = pixels(torch.uint8, 37, 45)
    tile = gather_torch(block_of(image, inside), inside, read, (37, 45), noise)
    assert torch.equal(tile, whole(image, read, noise))


@needs_triton
@NOISES
@pytest.mark.parametrize("case", READS)
def test_the_kernel_knows_the_border_rules(case, noise):
    read, inside = READS[case]
    block = block_of(pixels(torch.float32, 37, 45), inside)
    tile = gather(block, inside, read, (37, 45), noise, use_triton=True)
    twin = gather_torch(block, inside, read, (37, 45), noise)
    # Normals are equal to about 1e-6; a tenth of one in the picture.
    assert_close_to_twin(tile, twin, atol=0.0 if noise is None else 1e-6 if noise.channels else 2e-7)


@needs_triton
@pytest.mark.parametrize("target", ATOL)
@pytest.mark.parametrize("source", DTYPES)
def test_the_kernel_takes_every_dtype_and_layout(source, target):
    read, inside = Box(8, 16, 40, 48), Box(5, 11, 37, 45)
    image = pixels(source, 32, 34)
    twin = gather_torch(image, inside, read, (37, 45), NOISE, dtype=target)
    for _, block in layouts(image):
        tile = gather(block, inside, read, (37, 45), NOISE, dtype=target, use_triton=True)
        assert_close_to_twin(tile, twin, atol=ATOL[target])
        assert tile.is_contiguous(memory_format=torch.channels_last)


@needs_triton
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 1), (1, 9), (2, 300)])
def test_the_kernel_takes_odd_shapes(height, width, channels):
    block, frame = pixels(torch.uint8, height, width, channels), Box(0, 0, height, width)
    read = Box(0, 0, height + 7, width + 3)
    tile = gather(block, frame, read, (height, width), NOISE, use_triton=True)
    assert_close_to_twin(tile, gather_torch(block, frame, read, (height, width), NOISE), atol=2e-7)


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_triton)])
def test_noise_channels_are_there_without_noise_in_the_picture(use_triton):
    block, frame = pixels(torch.uint8, 9, 11), Box(0, 0, 9, 11)
    tile = gather(block, frame, frame, (9, 11), Noise(0.0, 7, 3, 2), use_triton=use_triton)[0]
    assert torch.equal(tile[:3], block / 255)
    torch.testing.assert_close(tile[3:], noise_torch(7, 3, frame, 5)[3:], atol=2e-6, rtol=0)


@needs_triton
def test_the_kernels_blocks_fit_together(small_blocks):
    block, frame, read = pixels(torch.uint8, 37, 45), Box(0, 0, 37, 45), Box(24, 8, 48, 56)
    tile = gather(block, frame, read, (37, 45), NOISE, use_triton=True)
    assert_close_to_twin(tile, gather_torch(block, frame, read, (37, 45), NOISE), atol=2e-7)


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_triton)])
def test_a_tile_goes_into_its_place_of_a_batch(use_triton):
    block, frame = pixels(torch.uint8, 9, 11), Box(0, 0, 9, 11)
    batch = poisoned((3, 3, 16, 16), memory_format=torch.channels_last)
    read = Box(0, 0, 16, 16)
    result = gather(block, frame, read, (9, 11), NOISE, out=batch[1:2], use_triton=use_triton)
    assert result.data_ptr() == batch[1].data_ptr()
    torch.testing.assert_close(batch[1:2], gather_torch(block, frame, read, (9, 11), NOISE), atol=2e-7, rtol=0)
    assert batch[0].isnan().all()
    assert batch[2].isnan().all()


@pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_triton)])
def test_what_a_block_lacks_is_refused(use_triton):
    block = pixels(torch.uint8, 9, 11)
    for inside, read, what in [
        (Box(0, 0, 9, 10), Box(0, 0, 9, 9), "is not the pixels of"),
        (Box(1, 0, 10, 11), Box(0, 0, 9, 11), "needs a row"),
        (Box(0, 0, 9, 11), Box(0, 0, 9, 12), "needs a column"),
    ]:
        with pytest.raises(ValueError, match=what):
            gather(block, inside, read, (20, 20), use_triton=use_triton)
    with pytest.raises(ValueError, match="channels-last"):
        gather(block, Box(0, 0, 9, 11), Box(0, 0, 9, 11), (20, 20), out=torch.empty(1, 3, 9, 11), use_triton=use_triton)
