"""Promises of a super-resolution network that is rendered in tiles: inherit ``StageTests`` and give a ``network``."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.geometry import Box
from engine.io.photo import TensorSource
from engine.kernels.noise import noise_torch
from engine.probe.seam import seam_curve
from engine.run.pipeline import tile_chain
from engine.run.stage import Stage
from engine.run.tiles import NOISE_SUBSTREAM
from support.plans import stages_of

EXACT = 1e-4
"""Largest difference in full scale: float32 sums in another order."""


def as_input(network, image, sigma=0.0, seed=0, position=0):
    """[3, h, w] -> [3 + noise channels, h, w]: the noise of the full map."""
    _, height, width = image.shape
    noise = noise_torch(seed, NOISE_SUBSTREAM + position, Box(0, 0, height, width), 3 + network.noise_channels)
    return torch.cat([image + sigma * noise[:3], noise[3:]])


def whole_image(network, image, sigma=0.0, seed=0, position=0):
    """The reference: noise on the full map, reflected once to whole windows, run in one piece, cropped, clamped."""
    _, height, width = image.shape
    image = as_input(network, image, sigma, seed, position)
    pad = ((0, 0), (0, -height % network.align), (0, -width % network.align))
    # torch's reflection, continued where the image is smaller than the padding.
    padded = torch.from_numpy(np.pad(image.numpy(), pad, mode="reflect"))
    with torch.inference_mode():
        output = network(padded[None])[0]
    return output[:, : height * network.scale, : width * network.scale].clamp(0, 1)


def exact_halo(network):
    """The receptive field, rounded up to whole windows."""
    return -(-network.radius // network.align) * network.align


class Chain:
    """Stages over an image as a render builds them. ``runs[i]``: LR pixels of every tile of stage i.

    Args:
        folder: scratch folder.
        network: network of every stage.
        image: [3, h, w], or a source.
        tiles: tile of every stage, in LR pixels.
        halos: halo of every stage, in LR pixels.
        sigma: standard deviation of the input noise.
        seed: seed of the noise.
        limit: bytes of every stage's cache.
        last: whether the last stage gives uint8.
        blend: width of the cross-fade, in LR pixels.
    """

    def __init__(self, folder, network, image, tiles, halos, *, sigma=0.0, seed=0, limit=1 << 30, last=True, blend=0):
        self.runs = [[] for _ in tiles]
        source = image if hasattr(image, "read") else TensorSource(image)
        cuts = stages_of(source.size, tiles, halos, [network.scale] * len(tiles), network.align)
        cuts = [replace(cut, sigma=sigma, blend=blend, is_image=cut.is_image and last) for cut in cuts]
        for cut in cuts:
            cut.check()
        stages = [Stage(network, torch.device("cpu"), "fp32")] * len(tiles)
        self.stages = tile_chain(
            cuts, stages, source, seed=seed, scratch=folder, cache_bytes=limit,
            on_pixels=lambda position, pixels: self.runs[position].append(pixels),
        )  # fmt: skip
        self.image = self.stages[-1]
        self.size = self.image.size

    def counts(self):
        """Number of tiles that ran, for every stage."""
        return [len(r) for r in self.runs]

    def render(self):
        """The whole output, tile by tile, as a render to a store does."""
        result = torch.empty(3, *self.size, dtype=self.image.dtype)
        for index in self.image.plan.grid.indices():
            box = self.image.plan.grid.box(*index)
            rows, columns = box.slices
            result[:, rows, columns] = self.image.read(box)
        return result


class StageTests:
    """Inherit and give a fixture ``network``: any upscaler of a few weights whose output varies within (0, 1)."""

    @pytest.fixture
    def network(self):
        raise NotImplementedError("every class that inherits these tests gives its own network")

    @pytest.fixture
    def tiled(self, network, tmp_path):
        """(image, tile, halo) -> the clamped float32 output of one stage, computed in tiles."""

        def run(image, tile, halo, **options):
            return Chain(tmp_path, network, image, [tile], [halo], last=False, **options).render()

        return run

    def test_output_varies_so_that_errors_show(self, network, picture):
        assert network.scale >= 1
        assert network.align >= 1
        assert network.radius >= 0
        output = whole_image(network, picture(5 * network.align + 1, 40))
        assert output.shape == (3, (5 * network.align + 1) * network.scale, 40 * network.scale)
        assert output.std() > 0.05
        assert ((output > 0) & (output < 1)).float().mean() > 0.9

    def test_tiles_equal_the_whole_at_the_exact_halo(self, network, tiled, picture):
        for height, width in ((71, 58), (64, 88)):
            image = picture(height, width)
            whole = whole_image(network, image)
            for tile in (16, 24, 40):
                difference = (tiled(image, tile, exact_halo(network)) - whole).abs()
                assert float(difference.max()) <= EXACT, (height, width, tile)

    def test_images_smaller_than_a_tile(self, network, tiled, picture):
        for height, width in ((3, 5), (8, 8), (9, 70), (11, 4)):
            image = picture(height, width)
            difference = (tiled(image, 32, exact_halo(network)) - whole_image(network, image)).abs()
            assert float(difference.max()) <= EXACT, (height, width)

    def test_noise_is_that_of_the_full_map(self, network, tiled, picture):
        image = picture(75, 90)
        whole = whole_image(network, image, sigma=0.1, seed=9)
        assert (whole - whole_image(network, image)).abs().max() > 0.02
        result = tiled(image, 24, exact_halo(network), sigma=0.1, seed=9)
        assert float((result - whole).abs().max()) <= EXACT

    def test_error_at_a_measured_halo_is_bounded(self, network, tiled, picture):
        """Measured on this picture at other cuts than those of the tiles: a bound, with room for where the cut falls."""
        image = picture(96, 144)
        whole = whole_image(network, image)
        points, _ = seam_curve(network, [as_input(network, image)[None]], network.scale, network.align)
        for tolerance in (4.0, 0.3):
            point = next(p for p in points if p.max <= tolerance)
            assert point.halo < exact_halo(network)
            errors = (tiled(image, 24, point.halo) - whole).abs() * 255
            assert float(errors.max()) <= 2 * tolerance
            # The result is an approximation: otherwise this test and the exact ones would detect no error.
            assert float(errors.max()) > 0.002

    def test_too_small_a_halo_shows(self, network, tiled, picture):
        image = picture(96, 96)
        assert float((tiled(image, 24, 0) - whole_image(network, image)).abs().max()) > 0.05

    def test_half_precision_is_close(self, network, picture):
        image = picture(48, 48)
        exact = whole_image(network, image)
        mixed = Stage(network, torch.device("cpu"), "bf16").run(as_input(network, image)[None])[0].float().clamp(0, 1)
        difference = (mixed - exact).abs()
        assert 0 < float(difference.mean()) < 2 / 255
        assert math.isfinite(float(mixed.sum()))
