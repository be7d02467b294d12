"""A stage in bands, as a stream of rows: a request for rows pulls rows from the source below, runs the network and trims.

A chain of stages holds the rows that its networks keep, and no image in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.bands.needs import Range
from engine.bands.stream import RowStream
from engine.device.heap import malloc_trim
from engine.device.queue import DeviceQueue, Download
from engine.errors import RenderError, option
from engine.geometry import Box
from engine.io.photo import Source
from engine.kernels.gather import gather
from engine.kernels.trim import trim
from engine.plan.limits import SOURCE_ROWS
from engine.plan.stage import StagePlan
from engine.run.stage import Stage
from engine.run.tiles import OnPixels, input_noise


class RowBlock(NamedTuple):
    """Consecutive rows of an image."""

    pixels: Tensor
    """[C, n, width]."""
    half: Tensor | None = None
    """uint8 [3, m, ceil(width / 2)]: rows of the halved image that these rows complete; a device makes them of its last stage.

    They count from the first row of the stream.
    """


class RowSource(Protocol):
    """A stream of rows."""

    def rows(self, first: int, last: int | None = None) -> Iterator[RowBlock]:
        """Consecutive rows from ``first`` on, up to ``last`` at least, or until the image ends."""
        ...


class SourceRows:
    """Columns [first, last) of an image that is read box by box."""

    def __init__(self, source: Source, columns: tuple[int, int]) -> None:
        self._source = source
        self._columns = columns

    def rows(self, first: int, last: int | None = None) -> Iterator[RowBlock]:
        end = self._source.size[0] if last is None else last
        for top in range(first, end, SOURCE_ROWS):
            yield RowBlock(self._source.read(Box(top, self._columns[0], min(top + SOURCE_ROWS, end), self._columns[1])))


class RowReader:
    """Reads any number of rows from blocks of any height."""

    def __init__(self, blocks: Iterator[RowBlock]) -> None:
        self._blocks = blocks
        self._rest: RowBlock | None = None
        self._in_pairs = True

    def take(self, rows: int) -> RowBlock:
        """The next rows, fewer only at the end of the image. Their half is None unless they are whole pairs of rows."""
        pixels, half = _Filled(rows), _Filled(-(-rows // 2))
        while pixels.count < rows and (block := self._rest or next(self._blocks, None)) is not None:
            rest = RowBlock(pixels.add(block.pixels), None if block.half is None else half.add(block.half))
            self._rest = rest if rest.pixels.shape[1] else None
            del block, rest  # freed before the next block is made
        # An odd last row is a pair at the image's end alone; elsewhere its half mixes it with the next row.
        is_whole = half.count == -(-pixels.count // 2) and (pixels.count % 2 == 0 or self._rest is None)
        self._in_pairs &= is_whole
        return RowBlock(pixels.result, half.result if self._in_pairs else None)


class _Filled:
    """Rows that are copied into one tensor block by block: a second copy of a row of shards would show in the peak."""

    def __init__(self, rows: int) -> None:
        self.count = 0
        self._rows = rows
        self._copied: Tensor | None = None

    def add(self, block: Tensor) -> Tensor:
        """Copy rows [C, n, width] as far as there is room, and return the others."""
        if self._copied is None:
            self._copied = block.new_empty(block.shape[0], self._rows, block.shape[2])
        part = block[:, : self._rows - self.count]
        self._copied[:, self.count : self.count + part.shape[1]] = part
        self.count += part.shape[1]
        return block[:, part.shape[1] :]

    @property
    def result(self) -> Tensor:
        """The rows that were copied."""
        return torch.empty(3, 0, 0) if self._copied is None else self._copied[:, : self.count]


class Columns(NamedTuple):
    """Half-open ranges of columns of a stage in one strip."""

    input: tuple[int, int]
    """LR columns of the padded frame."""
    output: tuple[int, int]
    """HR columns."""


class RowStreams:
    """One row stream for every position in the chain: strips of equal width reuse its buffers."""

    def __init__(self) -> None:
        self._streams: dict[int, tuple[Stage, RowStream]] = {}

    def of(self, position: int, stage: Stage, width: int, queue: DeviceQueue) -> RowStream:
        """The stream of the stage at a position, for ``width`` LR columns."""
        held, stream = self._streams.get(position, (None, None))
        if stream is None or held is not stage or stream.plan.width != width:
            stream = None
            if self._streams.pop(position, None) is not None:
                queue.release()  # its memory is free before the next one is made
            stream = RowStream(stage.stream_plan(width), stage.device)
            self._streams[position] = stage, stream
        return stream

    def clear(self) -> None:
        """Drop all streams."""
        self._streams.clear()


class NonFiniteRows(RenderError):
    """A stage made NaN or infinite values."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position
        """Position of the stage."""


class _RowsOnDevice(NamedTuple):
    """Output rows [first, last) that are computed and copied while the host goes on."""

    first: int
    last: int
    half_rows: int
    """Rows of the halved image that they complete; 0 if it is not made."""
    download: Download


class BandedStage:
    """Output rows of one stage in one strip, computed in bands when they are requested."""

    def __init__(
        self,
        plan: StagePlan,
        stage: Stage,
        stream: RowStream,
        queue: DeviceQueue,
        source: RowSource,
        columns: Columns,
        seed: int,
        on_pixels: OnPixels,
    ) -> None:
        """
        Args:
            plan: cut of the stage.
            stage: its network.
            stream: streaming form of the network, for the width of ``columns.input``.
            queue: queue of the device.
            source: rows of the stage before, or of the base image, in the columns inside the image.
            columns: columns of the strip.
            seed: seed of the input noise.
            on_pixels: called after each part of a band.
        """
        self._plan = plan
        self._stage = stage
        self._stream = stream
        self._queue = queue
        self._source = source
        self._columns = columns
        self._inside = plan.source_columns(columns.input)
        self._noise = input_noise(plan, seed, stage)
        self._on_pixels = on_pixels
        self._reported = 0
        self._halves = plan.is_image and queue.device.type != "cpu"
        self._above: Tensor | None = None
        """Last row of the image so far, on the device, if its pair is not complete."""

    def rows(self, first: int, last: int | None = None) -> Iterator[RowBlock]:
        """Rows from ``first`` on: uint8 for the last stage, on a device with their half, float32 in [0, 1] otherwise.

        The stream starts a receptive field above, on a multiple of its band, and every operation at the first row that
        later ones read. Its rows equal those of a stream from the top, bit for bit.
        """
        band, height = self._plan.band, self._plan.padded[0]
        above, image_end = self._plan.margins[0] * self._plan.scale, self._plan.grid.height
        end = image_end if last is None else min(last, image_end)
        needed = (first + above, end + above)
        read = self._stream.plan.rows_read(needed, height)
        start = read[0] // band * band
        malloc_trim()
        self._stream.start(start, height, needed)
        self._reported = self._stream.macs
        self._above = None
        running: deque[_RowsOnDevice] = deque()
        # A device computes the next band while the host looks at this one.
        ahead = self._stream.plan.parts if self._queue.is_asynchronous else 0
        try:
            for pixels in self._bands(start, read):
                for top, output in self._stage.push(self._stream, pixels):
                    self._report()
                    y = top - above
                    rows = Box(max(first, y), 0, min(end, y + output.shape[2]), 0)
                    if rows.height > 0:
                        is_end = rows.y1 == image_end
                        running.append(self._trimmed(output, rows.y0 - y, rows.y1 - y, y, is_end=is_end))
                    while running and (len(running) > ahead or rows.y1 == end):
                        yield self._checked(running.popleft())
                    if rows.y1 == end:
                        return
                self._report()
        finally:
            for left in running:
                left.download.result()  # memory must outlive its copies

    def _report(self) -> None:
        """Report the work since the last report, in LR pixels.

        The first output row comes after one receptive field of input rows, which may be the whole picture. So finished
        rows would tell nothing for a long time; multiply-adds grow evenly.
        """
        pixels = (self._stream.macs - self._reported) // self._stream.plan.macs_per_pixel
        if pixels:
            self._reported += pixels * self._stream.plan.macs_per_pixel
            self._on_pixels(self._plan.position, pixels)

    def _trimmed(self, output: Tensor, first: int, last: int, y: int, *, is_end: bool) -> _RowsOnDevice:
        x = self._columns.output[0] - (self._columns.input[0] - self._plan.margins[1]) * self._plan.scale
        crop = Box(first, x, last, x + self._columns.output[1] - self._columns.output[0])
        dtype = torch.uint8 if self._plan.is_image else torch.float32
        result = trim(
            output,
            crop,
            dtype,
            origin=(y + first, self._columns.output[0]),
            dither=self._plan.dither,
            halve=self._halves,
            above=self._above,
        )
        half = [] if result.half is None else [result.half]
        pairs, has_single = divmod(last - first + (self._above is not None), 2)
        self._above = result.pixels[:, -1] if half and has_single else None
        download = self._queue.download([result.pixels, result.nonfinite, *half])
        return _RowsOnDevice(y + first, y + last, pairs + (has_single and is_end), download)

    def _checked(self, rows: _RowsOnDevice) -> RowBlock:
        """The rows on the host. Raises NonFiniteRows."""
        pixels, nonfinite, *half = rows.download.result()
        if bad := int(nonfinite[:2].sum()):
            in_fp32 = self._stage.precision == "fp32"
            advice = "" if in_fp32 else f"use {option('precision', 'fp32')}, or "
            raise NonFiniteRows(
                f"{self._plan.name}: {bad} NaN or infinite values in rows {rows.first} to {rows.last - 1}"
                f"{', in fp32' if in_fp32 else ''}; the rows were not written; {advice}check the weights",
                self._plan.position,
            )
        return RowBlock(pixels, half[0][:, : rows.half_rows] if half else None)

    def _bands(self, start: int, rows: Range) -> Iterator[Tensor]:
        """Input of the network from row ``start`` on, [1, inputs, band, width], without end.

        It has noise, is reflected beyond the image's lower and right border, and is zero outside of ``rows``.
        """
        height, band = self._plan.height, self._plan.band
        left, right = self._inside
        columns = self._columns.input
        inside = self._plan.source_box(Box(rows[0], columns[0], rows[1], columns[1]))
        source, taken = RowReader(self._source.rows(inside.y0, inside.y1)), inside.y0
        pixels = torch.empty(3, 0, right - left)
        uploads = self._queue.uploads(3 * (band + self._plan.align) * (right - left), torch.float32)
        for top in count(start, band):
            if (bottom := min(top + band, inside.y1)) > taken:
                # The border reflects the rows before it.
                pixels = torch.cat([pixels[:, -self._plan.align :], source.take(bottom - taken).pixels], 1)
                taken = bottom
            block = Box(taken - pixels.shape[1], left, taken, right)
            begin = max(top, rows[0])
            read = Box(begin, columns[0], max(begin, min(top + band, rows[1])), columns[1])
            size = (height, self._plan.width)
            x = gather(uploads.start(pixels), block, read, size, self._noise)
            uploads.read()
            yield torch.nn.functional.pad(x, (0, 0, begin - top, band - x.shape[2] - (begin - top)))
