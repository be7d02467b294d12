"""A stage as a lazy image: asking it for a box pulls what it needs from the level below, runs the network and trims.

Full render, resume and a region of interest are the same call on other boxes. How tiles are run, one by one or many at
once on an accelerator, is a ``Runner``'s business; what a tile is made of and when it is accepted is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from engine.errors import RenderError
from engine.geometry import Box
from engine.io.photo import Source
from engine.kernels.gather import Noise, gather
from engine.kernels.trim import Trimmed, trim
from engine.plan.plan import StagePlan, Tile
from engine.run.blend import TileBlender
from engine.run.stage import Stage
from engine.run.tile_cache import TileCache

NOISE_SUBSTREAM = 1 << 16
"""Noise stream of the first super-resolution stage; the scales of step 1 use the small numbers."""

Runner: TypeAlias = Callable[["TiledStage", Iterable[Tile]], Iterator[tuple[Tile, Tensor]]]
"""Computes tiles: yields each, in order, with its accepted pixels on the host, which the receiver may keep."""


def input_noise(plan: StagePlan, position: int, seed: int, stage: Stage) -> Noise | None:
    """What a stage's input takes besides the picture; None without any. ``position``: its place in the chain."""
    if not plan.sigma and not stage.noise_channels:
        return None
    return Noise(plan.sigma, seed, NOISE_SUBSTREAM + position, stage.noise_channels)


def one_by_one(image: TiledStage, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Tensor]]:
    """The reference ``Runner``."""
    return ((tile, image.compute(tile)) for tile in tiles)


def made_dtype(plan: StagePlan, last: bool) -> torch.dtype:
    """Of what tiles make: tiles that are blended are rounded afterwards."""
    return torch.uint8 if last and not plan.blend else torch.float32


def trimmed(plan: StagePlan, tile: Tile, output: Tensor, last: bool, out: Trimmed | None = None) -> Trimmed:
    """What a tile makes, out of the network's ``output`` [1, C, H, W]."""
    origin, dtype = (tile.made.y0, tile.made.x0), made_dtype(plan, last)
    return trim(output, tile.core, dtype, origin=origin, dither=plan.dither, out=out)


class TiledStage:
    """The output of one stage. ``position``: its place in the chain, which selects its noise. ``redone``: how many tiles
    half precision could not make, so that they were computed again in float32.
    """

    def __init__(
        self,
        plan: StagePlan,
        position: int,
        seed: int,
        stage: Stage,
        below: Source,
        cache: TileCache,
        last: bool,
        on_tile: Callable[[int, int], None],
        run: Runner = one_by_one,
    ) -> None:
        self.plan = plan
        self.size = (plan.grid.height, plan.grid.width)
        self.position = position
        self.stage = stage
        self.dtype = torch.uint8 if last else torch.float32
        self.redone = 0
        self._blender = TileBlender(plan, self.dtype) if plan.blend else None
        self._noise = input_noise(plan, position, seed, stage)
        self._below = below
        self._cache = cache
        self._last = last
        self._on_tile = on_tile
        self._run = run

    def read(self, box: Box) -> Tensor:
        """Pixels of ``box``: uint8 for the last stage, float32 in [0, 1] otherwise. [C, h, w]."""
        tiles = list(self.plan.tiles(box))
        missing = [t for t in tiles if (t.row, t.column) not in self._cache]
        # A tile of the last stage that the box holds whole is used once; one of an inner stage is in its neighbours' halos.
        once = {t: None for t in missing if self._last and box.contains(t.write)}
        for tile, pixels in self.cells([t for t in missing if t not in once]):
            self._cache.put((tile.row, tile.column), pixels.numpy())
        fresh = self.cells(list(once))
        if [t.write for t in once] == [box]:
            ((_, pixels),) = fresh
            return pixels
        result = torch.empty(3, *box.shape, dtype=self.dtype)
        for tile, pixels in fresh:
            result[(slice(None), *tile.write.relative_to(box).slices)] = pixels
        for tile in tiles:
            if tile not in once:
                part = tile.write.clip(box)
                kept = self._cache.read((tile.row, tile.column), part, tile.write)
                result[(slice(None), *part.relative_to(box).slices)] = torch.from_numpy(kept)
        return result

    def cells(self, tiles: Sequence[Tile]) -> Iterator[tuple[Tile, Tensor]]:
        """Computes ``tiles``, from top to bottom and left to right: yields each with the pixels of its cell."""
        if self._blender is None:
            return self._run(self, tiles)
        return self._blender.join(tiles, partial(self._run, self))

    def block(self, tile: Tile) -> Tensor:
        """What a tile takes from the level below, on the host, float32 [C, h, w]."""
        return self._below.read(self.plan.needs(tile.read))

    def place(self, block: Tensor, tile: Tile, out: Tensor | None = None) -> Tensor:
        """A tile's ``block`` as the network's input, on the stage's device, [1, inputs, h, w]; into ``out`` if it is given."""
        inside = self.plan.needs(tile.read)
        return gather(block, inside, tile.read, self._below.size, self._noise, device=self.stage.device, out=out)

    def compute(self, tile: Tile) -> Tensor:
        """What a tile makes, [C, h, w]."""
        made = self._through(self.stage, tile)
        return self.accept(tile, made.pixels.cpu(), made.nonfinite)

    def accept(self, tile: Tile, pixels: Tensor, nonfinite: Tensor) -> Tensor:
        """What a tile makes if ``nonfinite`` (``Trimmed.nonfinite``) is clean. If not, and half precision may be to blame, the
        tile alone is computed in float32. Raises RenderError when it is not finite in float32.
        """
        nans, infinities, saturated = nonfinite.tolist()
        if nans or infinities or saturated:
            exact = self.stage.exact
            if exact is not None:
                made = self._through(exact, tile)
                nans, infinities, _ = made.nonfinite.tolist()
                pixels, self.redone = made.pixels.cpu(), self.redone + 1
            if bad := nans + infinities:
                advice = "render again with --precision fp32, or " if exact is None else ""
                raise RenderError(
                    f"{self.plan.name}: {bad} values of tile (row {tile.row}, column {tile.column}) are NaN or infinite"
                    f"{' in fp32 too' if exact else ''}; the tile was not written; {advice}check the weights"
                )
        self._on_tile(self.position, tile.read.area)
        return pixels

    def _through(self, stage: Stage, tile: Tile) -> Trimmed:
        return trimmed(self.plan, tile, stage.run(self.place(self.block(tile), tile)), self._last)
