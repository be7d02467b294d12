"""A stage as a stream of rows: asked for its rows from one on, it pulls those below, runs the network band by band, trims.

The sibling of engine.run.tiles: what a chain of stages holds is the rows that its networks keep, and no image in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from engine.bands.stream import RowStream
from engine.device.heap import malloc_trim
from engine.errors import RenderError
from engine.geometry import Box
from engine.io.photo import Source
from engine.kernels.gather import gather
from engine.kernels.trim import trim
from engine.plan.plan import StagePlan
from engine.run.stage import Stage
from engine.run.tiles import input_noise

_BLOCK = 64


class RowSource(Protocol):
    """``rows(first)``: consecutive rows from ``first`` on, in blocks [3, n, width], until the image ends."""

    def rows(self, first: int) -> Iterator[Tensor]: ...


class SourceRows:
    """Columns [first, last) of an image that is read box by box."""

    def __init__(self, source: Source, columns: tuple[int, int]) -> None:
        self._source = source
        self._columns = columns

    def rows(self, first: int) -> Iterator[Tensor]:
        height = self._source.size[0]
        for top in range(first, height, _BLOCK):
            yield self._source.read(Box(top, self._columns[0], min(top + _BLOCK, height), self._columns[1]))


class RowReader:
    """Takes blocks of rows as they come and gives as many rows as are asked for."""

    def __init__(self, blocks: Iterator[Tensor]) -> None:
        self._blocks = blocks
        self._left: Tensor | None = None

    def take(self, rows: int) -> Tensor:
        """[3, rows, width]; fewer only where the image ends."""
        taken, result = 0, torch.empty(3, 0, 0)
        while (
            taken < rows and (block := self._left if self._left is not None else next(self._blocks, None)) is not None
        ):
            if taken == 0:  # filled as they come: a row of shards, held twice, would be felt
                result = block.new_empty(3, rows, block.shape[2])
            part = block[:, : rows - taken]
            result[:, taken : taken + part.shape[1]] = part
            self._left = block[:, part.shape[1] :] if block.shape[1] > part.shape[1] else None
            taken += part.shape[1]
        return result[:, :taken]


class BandedStage:
    """The output of one stage in the HR columns [first, last) of ``columns``, of which it reads the LR columns ``reads``
    of the padded frame; ``below`` has those that lie inside the image. ``position``: its place in the chain, which
    selects its noise.
    """

    def __init__(
        self,
        plan: StagePlan,
        position: int,
        seed: int,
        stage: Stage,
        stream: RowStream,
        below: RowSource,
        columns: tuple[int, int],
        reads: tuple[int, int],
        last: bool,
        on_rows: Callable[[int, int], None],
    ) -> None:
        self._plan = plan
        self._position = position
        self._seed = seed
        self._stage = stage
        self._stream = stream
        self._below = below
        self._columns = columns
        self._reads = reads
        self._inside = plan.inside(reads)
        self._last = last
        self._on_rows = on_rows

    def rows(self, first: int) -> Iterator[Tensor]:
        """uint8 for the last stage, float32 in [0, 1] otherwise.

        The stream starts at least the receptive field above, on a multiple of its band: the rows that are given are
        those of a stream from the top, bit for bit.
        """
        scale, band, margin = self._plan.scale, self._plan.band, self._plan.margin
        start = max(0, margin + first // scale - self._stage.radius) // band * band
        end = self._plan.grid.height
        malloc_trim()
        self._stream.start(start, self._plan.padded[0])
        for pixels in self._bands(start):
            for top, output in self._stage.push(self._stream, pixels):
                y = top - margin * scale
                rows = Box(max(first, y), 0, min(end, y + output.shape[2]), 0)
                if rows.height > 0:
                    self._on_rows(self._position, (rows.y1 // scale - rows.y0 // scale) * pixels.shape[3])
                    yield self._trimmed(output, rows.y0 - y, rows.y1 - y, y)
                if rows.y1 == end:
                    return

    def _trimmed(self, output: Tensor, first: int, last: int, y: int) -> Tensor:
        x = self._columns[0] - (self._reads[0] - self._plan.margin) * self._plan.scale
        core = Box(first, x, last, x + self._columns[1] - self._columns[0])
        dtype, origin = torch.uint8 if self._last else torch.float32, (y + first, self._columns[0])
        trimmed = trim(output, core, dtype, origin=origin, dither=self._plan.dither)
        if bad := trimmed.nonfinite_count:
            raise RenderError(
                f"{self._plan.name}: {bad} values of rows {y + first} to {y + last - 1} are NaN or infinite; "
                "they were not written; render again with --precision fp32, or check the weights"
            )
        return trimmed.pixels.cpu()

    def _bands(self, start: int) -> Iterator[Tensor]:
        """The network's input from row ``start`` on, [1, inputs, band, width]: with noise, reflected past the image's lower and
        right border, zero below the frame, for ever.
        """
        height, band = self._plan.height, self._plan.band
        left, right = self._inside
        below = RowReader(self._below.rows(start))
        noise = input_noise(self._plan, self._position, self._seed, self._stage)
        known = torch.empty(3, 0, right - left)
        for top in count(start, band):
            if (fresh := min(band, height - top)) > 0:
                # The rows before are what the border reflects.
                known = torch.cat([known[:, -self._plan.align :], below.take(fresh)], 1)
            bottom = min(top + band, height)
            block = Box(bottom - known.shape[1], left, bottom, right)
            read = Box(top, self._reads[0], max(top, min(top + band, self._plan.padded[0])), self._reads[1])
            x = gather(known, block, read, (height, self._plan.width), noise, device=self._stage.device)
            yield torch.nn.functional.pad(x, (0, 0, 0, band - x.shape[2]))
