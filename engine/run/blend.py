"""Cross-fade of a stage's tiles where they overlap, on the device that computes them. Only the borders of a tile are kept, for
its neighbours.

A tile computes, beyond its own cell, a border to the right and one below. A cell is blended from its own tile and the borders
of the three tiles before it (left, above, above left), each pixel once and in any order.
"""

from __future__ import annotations

from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from engine.device.queue import OutOfDeviceMemory, memory_errors
from engine.device.runtime import activate
from engine.geometry import Box
from engine.kernels.blend import blend
from engine.kernels.trim import trim
from engine.plan.stage import StagePlan, Tile

RunTiles = Callable[[Iterable[Tile]], Iterator[tuple[Tile, Tensor]]]
"""Tiles -> each, in order, with its output: float32 [C, h, w] in [0, 1] of its box ``output``."""


class _Borders(NamedTuple):
    """Output of a tile beyond its cell."""

    right: Tensor
    """As high as the cell."""
    below: Tensor
    """As wide as the whole output."""


class TileBlender:
    """Cross-fades the tiles of one stage. ``dtype``: uint8 (rounded, dithered if planned) or float32. Cells are on the host."""

    def __init__(self, plan: StagePlan, dtype: torch.dtype) -> None:
        self._plan = plan
        self._dtype = dtype
        self._borders: OrderedDict[tuple[int, int], _Borders] = OrderedDict()

    def blend(self, tiles: Sequence[Tile], run: RunTiles) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile with the blended pixels of its cell, [C, h, w].

        Args:
            tiles: tiles from top to bottom and left to right.
            run: computes tiles. A neighbour whose borders are no longer kept is computed again.
        """
        requested = {(t.row, t.column) for t in tiles}
        neighbours = {index for cell in requested for index in self._plan.blended_into(*cell)}
        kept = {index: self._borders[index] for index in neighbours if index in self._borders}
        needed = sorted(requested | neighbours - kept.keys())
        for tile, output in run(self._plan.tile_at(*index) for index in needed):
            with self._on(output.device):
                cell = (
                    self._cell(tile, output, ChainMap(self._borders, kept))
                    if (tile.row, tile.column) in requested
                    else None
                )
                self._keep(tile, output)
            if cell is not None:
                yield tile, cell

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        """Activate the device of the tiles, and mark an exhausted memory as this stage's."""
        try:
            with activate(device), memory_errors():
                yield
        except OutOfDeviceMemory as error:
            error.position = self._plan.position
            raise

    def _keep(self, tile: Tile, output: Tensor) -> None:
        height, width = tile.cell.shape
        self._borders[tile.row, tile.column] = _Borders(output[:, :height, width:].clone(), output[:, height:].clone())
        while len(self._borders) > self._plan.borders_kept:
            self._borders.popitem(last=False)

    def _cell(self, tile: Tile, output: Tensor, borders: Mapping[tuple[int, int], _Borders]) -> Tensor:
        """The cell of a tile's output, with the neighbours' borders blended in."""
        height, width = tile.cell.shape
        cell, ramp = output[:, :height, :width].clone(), self._plan.ramp
        beside = borders[tile.row, tile.column - 1].right if tile.column else None
        above = borders[tile.row - 1, tile.column].below if tile.row else None
        across, down = 0, 0
        if beside is not None:
            across = min(beside.shape[2], width)
            cell[:, :, :across] = blend(beside[:, :height, :across], cell[:, :, :across], "x", ramp)
        if above is not None:
            down = min(above.shape[1], height)
            upper = above[:, :down, :width].clone()
            if beside is not None:
                corner = borders[tile.row - 1, tile.column - 1].below[:, :down, -beside.shape[2] :][:, :, :across]
                upper[:, :, :across] = blend(corner, upper[:, :, :across], "x", ramp)
            cell[:, :down] = blend(upper, cell[:, :down], "y", ramp)
        if self._dtype == torch.float32:
            return cell.cpu()
        origin = tile.cell.y0, tile.cell.x0
        return trim(
            cell[None], Box(0, 0, height, width), self._dtype, origin=origin, dither=self._plan.dither
        ).pixels.cpu()
