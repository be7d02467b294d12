"""A stage as a lazy image: asking it for a box pulls what it needs from the level below, runs the network and trims.

Full render, resume and a region of interest are the same call on other boxes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.cache import Array, TileCache
from engine.errors import RenderError
from engine.geometry import Box
from engine.kernels.gather import Noise, gather
from engine.kernels.trim import trim
from engine.plan import StagePlan, Tile
from engine.sources import Source
from engine.stages import Stage

NOISE_STREAM = 1 << 16
"""Noise stream of the first super-resolution stage; the scales of step 1 use the small numbers."""


class StageImage:
    """The output of one stage. ``position``: its place in the chain, which selects its noise."""

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
    ) -> None:
        self.plan = plan
        self.size = (plan.grid.height, plan.grid.width)
        self._position = position
        self._seed = seed
        self._stage = stage
        self._below = below
        self._cache = cache
        self._last = last
        self._on_tile = on_tile

    def read(self, box: Box) -> torch.Tensor:
        """Pixels of ``box``: uint8 for the last stage, float32 in [0, 1] otherwise. [C, h, w]."""
        tiles = list(self.plan.tiles(box))
        if self._last and len(tiles) == 1 and tiles[0].write == box:
            return torch.from_numpy(self._fresh(tiles[0]))
        result = torch.empty(3, *box.shape, dtype=torch.uint8 if self._last else torch.float32)
        for tile in tiles:
            part = tile.write.clip(box)
            rows, columns = part.relative_to(box).slices
            result[:, rows, columns] = torch.from_numpy(self._part(tile, part))
        return result

    def _fresh(self, tile: Tile) -> Array:
        """A tile of the last stage that is asked for whole is used once: it bypasses the cache. One of an inner stage is
        part of its neighbours' halos, too.
        """
        index = (tile.row, tile.column)
        return self._cache.read(index, tile.write, tile.write) if index in self._cache else self._compute(tile)

    def _part(self, tile: Tile, part: Box) -> Array:
        index = (tile.row, tile.column)
        if index not in self._cache:
            self._cache.put(index, self._compute(tile))
        return self._cache.read(index, part, tile.write)

    def _compute(self, tile: Tile) -> Array:
        pixels = self._input(tile)
        output = self._stage.run(pixels)
        trimmed = trim(output, tile.core, torch.uint8 if self._last else torch.float32)
        if bad := trimmed.bad:
            raise RenderError(
                f"{self.plan.name}: {bad} values of tile (row {tile.row}, column {tile.column}) are NaN or infinite; "
                "the tile was not written; render again with --precision fp32, or check the weights"
            )
        self._on_tile(self._position, tile.read.area)
        result: Array = np.asarray(trimmed.pixels.cpu().numpy())
        return result

    def _input(self, tile: Tile) -> torch.Tensor:
        inside = self.plan.needs(tile.read)
        noise = Noise(self.plan.sigma, self._seed, NOISE_STREAM + self._position) if self.plan.sigma else None
        return gather(self._below.read(inside), inside, tile.read, self._below.size, noise, device=self._stage.device)
