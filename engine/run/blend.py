"""Blends the tiles of a stage where they overlap, and keeps of every tile only what its neighbours still need.

A tile makes, beyond its own cell, a strip to the right and one below. So a cell is blended out of its tile and the
strips of the three before it (to the left, above, and between them), each pixel once, whatever the order.
"""

from __future__ import annotations

from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.geometry import Box
from engine.kernels.blend import blend
from engine.kernels.trim import trim
from engine.plan.plan import StagePlan, Tile

Run = Callable[[Iterable[Tile]], Iterator[tuple[Tile, Tensor]]]
"""Tiles -> each, in order, with what it makes: float32 [C, h, w] in [0, 1] of its box ``made``."""


class _Strips(NamedTuple):
    """What a tile makes beyond its cell: beside it, as high as the cell, and below it, as wide as all that it makes."""

    right: Tensor
    below: Tensor


class TileBlender:
    """The tiles of one stage on their way to its pixels, of ``dtype``."""

    def __init__(self, plan: StagePlan, dtype: torch.dtype) -> None:
        self._plan = plan
        self._dtype = dtype
        self._kept: OrderedDict[tuple[int, int], _Strips] = OrderedDict()

    def join(self, tiles: Sequence[Tile], run: Run) -> Iterator[tuple[Tile, Tensor]]:
        """``tiles`` from top to bottom and left to right -> each with the pixels of its cell. What a neighbour has made
        before and is no longer kept is made again.
        """
        wanted = {(t.row, t.column) for t in tiles}
        before = {index for t in wanted for index in self._plan.before(*t)}
        kept = {index: self._kept[index] for index in before if index in self._kept}
        needed = sorted(wanted | before - kept.keys())
        for tile, made in run(self._plan.tile(*index) for index in needed):
            if (tile.row, tile.column) in wanted:
                yield tile, self._cell(tile, made, ChainMap(self._kept, kept))
            self._keep(tile, made)

    def _keep(self, tile: Tile, made: Tensor) -> None:
        height, width = tile.write.shape
        self._kept[tile.row, tile.column] = _Strips(made[:, :height, width:].clone(), made[:, height:].clone())
        while len(self._kept) > self._plan.strips_kept:
            self._kept.popitem(last=False)

    def _cell(self, tile: Tile, made: Tensor, strips: Mapping[tuple[int, int], _Strips]) -> Tensor:
        """The strips of the neighbours blended into what the tile makes of its cell."""
        height, width = tile.write.shape
        cell, ramp = made[:, :height, :width].clone(), self._plan.ramp
        beside = strips[tile.row, tile.column - 1].right if tile.column else None
        above = strips[tile.row - 1, tile.column].below if tile.row else None
        across, down = 0, 0
        if beside is not None:
            across = min(beside.shape[2], width)
            cell[:, :, :across] = blend(beside[:, :height, :across], cell[:, :, :across], "x", ramp)
        if above is not None:
            down = min(above.shape[1], height)
            upper = above[:, :down, :width].clone()
            if beside is not None:
                corner = strips[tile.row - 1, tile.column - 1].below[:, :down, -beside.shape[2] :][:, :, :across]
                upper[:, :, :across] = blend(corner, upper[:, :, :across], "x", ramp)
            cell[:, :down] = blend(upper, cell[:, :down], "y", ramp)
        if self._dtype == torch.float32:
            return cell
        origin = tile.write.y0, tile.write.x0
        return trim(cell[None], Box(0, 0, height, width), self._dtype, origin=origin, dither=self._plan.dither).pixels
