"""A stage in tiles, as a lazy image: a read pulls pixels from the source below, runs the network and trims.

A full render, a resumed render and a region are the same calls for other boxes. A ``TileRunner`` decides how tiles run, one by
one or in batches; this module decides how a tile is made and when it is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from engine.device.queue import OutOfDeviceMemory, memory_errors
from engine.errors import RenderError, option
from engine.geometry import Box
from engine.io.photo import Source
from engine.kernels.gather import Noise, gather
from engine.kernels.trim import Trimmed, trim
from engine.plan.stage import StagePlan, Tile
from engine.run.blend import TileBlender
from engine.run.stage import Stage
from engine.run.tile_cache import TileCache

NOISE_SUBSTREAM = 1 << 16
"""Noise substream of the first super-resolution step; the scales of step 1 use the small numbers."""

OnPixels: TypeAlias = Callable[[int, int], None]
"""Called with (position of the stage, LR pixels) after a network has run."""

TileRunner: TypeAlias = Callable[["TiledStage", Iterable[Tile]], Iterator[tuple[Tile, Tensor]]]
"""Computes tiles: yields each, in order, with its valid output, which the receiver may keep: on the host, or on the device if
it is cross-faded there."""


def input_noise(plan: StagePlan, seed: int, stage: Stage) -> Noise | None:
    """Noise of a stage's input; None if it takes none."""
    if not plan.sigma and not stage.noise_channels:
        return None
    substream = NOISE_SUBSTREAM + plan.position
    return Noise(plan.sigma, seed, substream, stage.noise_channels, plan.period, plan.start)


def one_by_one(image: TiledStage, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Tensor]]:
    """The reference ``TileRunner``."""
    return ((tile, image.compute(tile)) for tile in tiles)


def output_dtype(plan: StagePlan) -> torch.dtype:
    """Dtype of a tile's output: uint8 for the last stage, float32 if it is cross-faded first."""
    return torch.uint8 if plan.is_image and not plan.blend else torch.float32


def trimmed(plan: StagePlan, tile: Tile, output: Tensor, out: Trimmed | None = None) -> Trimmed:
    """A tile's output, cropped from the network's ``output`` [1, C, H, W]."""
    origin, halve = (tile.output.y0, tile.output.x0), out is not None and out.half is not None
    return trim(output, tile.crop, output_dtype(plan), origin=origin, dither=plan.dither, halve=halve, out=out)


class TiledStage:
    """Output of one stage, computed in tiles when it is read."""

    def __init__(
        self,
        plan: StagePlan,
        stage: Stage,
        source: Source,
        cache: TileCache,
        seed: int,
        on_pixels: OnPixels,
        run: TileRunner = one_by_one,
    ) -> None:
        """
        Args:
            plan: cut of the stage.
            stage: its network.
            source: input image: the stage before, or the base image.
            cache: finished tiles.
            seed: seed of the input noise.
            on_pixels: called after each tile.
            run: how tiles run.
        """
        self.plan = plan
        self.size = (plan.grid.height, plan.grid.width)
        self.stage = stage
        self.dtype = torch.uint8 if plan.is_image else torch.float32
        self._redone_tiles: dict[tuple[int, int], Trimmed] = {}
        self.redone = 0
        """Tiles that half precision could not represent and float32 computed again."""
        self._blender = TileBlender(plan, self.dtype) if plan.blend else None
        self._noise = input_noise(plan, seed, stage)
        self._source = source
        self._cache = cache
        self._on_pixels = on_pixels
        self._run = run

    def read(self, box: Box) -> Tensor:
        """Pixels of ``box``, [C, h, w]: uint8 for the last stage, float32 in [0, 1] otherwise."""
        tiles = list(self.plan.tiles(box))
        missing = [t for t in tiles if (t.row, t.column) not in self._cache]
        # A tile of the last stage that lies whole in the box is used once; a tile of an inner stage is in its neighbours' halos.
        once = {t: None for t in missing if self.plan.is_image and box.contains(t.cell)}
        for tile, pixels in self.compute_cells([t for t in missing if t not in once]):
            self._cache.put((tile.row, tile.column), pixels.numpy())
        fresh = self.compute_cells(list(once))
        if [t.cell for t in once] == [box]:
            ((_, pixels),) = fresh
            return pixels
        result = torch.empty(3, *box.shape, dtype=self.dtype)
        for tile, pixels in fresh:
            result[(slice(None), *tile.cell.relative_to(box).slices)] = pixels
        for tile in tiles:
            if tile not in once:
                part = tile.cell.clip(box)
                cached = self._cache.read((tile.row, tile.column), part, tile.cell)
                result[(slice(None), *part.relative_to(box).slices)] = torch.from_numpy(cached)
        return result

    def compute_cells(self, tiles: Sequence[Tile]) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each of ``tiles`` (top to bottom, left to right) with the pixels of its cell."""
        if self._blender is None:
            return self._run(self, tiles)
        return self._blender.blend(tiles, partial(self._run, self))

    def read_input(self, tile: Tile) -> Tensor:
        """Source pixels of a tile, on the host, float32 [C, h, w]."""
        return self._source.read(self.plan.source_box(tile.read))

    def gather_input(self, pixels: Tensor, tile: Tile, out: Tensor | None = None) -> Tensor:
        """The network's input [1, inputs, h, w] on its device, from a tile's source pixels; written to ``out`` if given."""
        inside = self.plan.source_box(tile.read)
        return gather(pixels, inside, tile.read, self._source.size, self._noise, device=self.stage.device, out=out)

    def compute(self, tile: Tile) -> Tensor:
        """Output of a tile, [C, h, w]: on the host, or on the device if it is cross-faded there."""
        result = self._compute_with(self.stage, tile, None)
        pixels = result.pixels.cpu() if self._blender is None else result.pixels
        return self.validate(tile, result._replace(pixels=pixels)).pixels

    def validate(self, tile: Tile, result: Trimmed, tail_chunks: int | None = None) -> Trimmed:
        """The tile's output, valid: where half precision overflowed, the tile alone is computed again in float32.

        Args:
            tile: tile that was computed.
            result: its output.
            tail_chunks: chunks of the tail in float32; by default the device's.

        Raises:
            RenderError: float32 gives NaN or infinite values too.
        """
        nans, infinities, saturated = result.nonfinite.tolist()
        if nans or infinities or saturated:
            fallback = self.stage.fp32_fallback
            if fallback is not None:
                redone = self._redone_tiles.pop((tile.row, tile.column), None) or self._redo(tile, tail_chunks)
                nans, infinities, _ = redone.nonfinite.tolist()
                result = redone._replace(pixels=redone.pixels.to(result.pixels.device))
                self.redone += 1
            if bad := nans + infinities:
                advice = f"use {option('precision', 'fp32')}, or " if fallback is None else ""
                raise RenderError(
                    f"{self.plan.name}: {bad} NaN or infinite values in tile (row {tile.row}, column {tile.column})"
                    f"{', in fp32 too' if fallback else ''}; the tile was not written; {advice}check the weights"
                )
        self._on_pixels(self.plan.position, tile.read.area)
        return result

    def _redo(self, tile: Tile, tail_chunks: int | None) -> Trimmed:
        """The tile's output in float32.

        Raises:
            OutOfDeviceMemory: float32 takes twice the memory, which batches may hold; with a function that repeats it.
        """

        def again() -> None:
            self._redone_tiles[tile.row, tile.column] = self._in_float32(tile, tail_chunks)
            self.stage.release_fp32()  # the batches need the memory again

        try:
            return self._in_float32(tile, tail_chunks)
        except OutOfDeviceMemory as error:
            error.redo = again
            raise

    def _in_float32(self, tile: Tile, tail_chunks: int | None) -> Trimmed:
        with memory_errors():
            fallback = self.stage.fp32_fallback
            assert fallback is not None
            result = self._compute_with(fallback, tile, tail_chunks)
            return Trimmed(result.pixels.cpu(), None, result.nonfinite.cpu())

    def _compute_with(self, stage: Stage, tile: Tile, tail_chunks: int | None) -> Trimmed:
        return trimmed(self.plan, tile, stage.run(self.gather_input(self.read_input(tile), tile), tail_chunks))
