"""The plan of a render: canvas, tiles or strips, halos, shards. Knows nothing of tensors.

A ``Plan`` holds every field that decides a pixel and no other, so equal plans give equal bits (with the same
processor instructions and threads, which a store records) and a stored plan can be
compared on resume (docs/decisions/0005). Its cost is a ``Projection`` (engine.plan.cost), which differs between machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from engine.geometry import Box, Grid
from engine.pixels import PLAIN, PixelFormat, pixels_of
from engine.plan.reduction import Reduction
from engine.plan.sides import Sides, pyramid_of, sides_of, stored_sides
from engine.plan.stage import StagePlan, step_of
from engine.plan.writes import Writes, spans_of

RENAMED_EXECUTORS = {"stream": "batched"}
"""Former names of executors, in stored plans and in requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every field that decides the output's pixels. Sizes are (height, width) in pixels."""

    canvas: tuple[int, int]
    """Size of the whole image."""
    roi: Box
    """Region of interest that is written, in canvas pixels."""
    base: tuple[int, int]
    """Size of the base image: step 1's output, or the picture given instead, with its margin."""
    stages: tuple[StagePlan, ...]
    """Cut of every super-resolution step, first step first."""
    shard: Sides
    """(height, width) of a shard, in pixels."""
    chunk: Sides
    """(height, width) of an inner chunk, in pixels."""
    seed: int
    """Seed of all noise."""
    model_digest: str
    """SHA-256 of the model's contents that decide pixels."""
    precision: str
    """Precision of all stages, or of each, separated by commas."""
    backend: str
    """Device type and version of torch."""
    executor: str = "tiles"
    """Key of ``engine.plan.layouts.EXECUTORS``: a GPU may round a batch in another way than a single tile."""
    init_digest: str | None = None
    """SHA-256 of the picture that replaces step 1."""
    enlarged: tuple[int, int] | None = None
    """Size of the last step's image where it is reduced to the canvas; None if it is the canvas."""
    pixels: PixelFormat = PLAIN
    """Channels and depth of the written image."""
    profile: str | None = None
    """SHA-256 of the ICC profile of its colours; None for sRGB, and for grey without a profile."""
    noise_gain: tuple[float, ...] = ()
    """Factor of every step's noise channels, in addition to the model's own; empty if all are 1."""

    @property
    def reduction(self) -> Reduction:
        """Reduction of the last step's image to the canvas; the identity if there is none."""
        source, last = self.enlarged or self.canvas, self.stages[-1]
        margin = tuple(
            (n - m) // 2 if period else 0
            for n, m, period in zip(last.grid.bounds.shape, source, last.period, strict=True)
        )
        return Reduction(source, self.canvas, margin)  # type: ignore[arg-type]

    @property
    def is_direct(self) -> bool:
        """Whether the last step's rounded output is the image."""
        return self.reduction.is_identity and self.pixels.is_plain

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the written image: the region of interest, or the whole canvas."""
        return self.roi.shape

    @property
    def is_whole(self) -> bool:
        """Whether the whole canvas is written, not a region of it."""
        return self.roi == Box(0, 0, *self.canvas)

    @property
    def is_banded(self) -> bool:
        """Whether the stages run in bands, not in tiles."""
        return self.stages[-1].band > 0

    @property
    def needs_halos(self) -> bool:
        """Whether halos decide pixels: not in bands of one strip as wide as the canvas, which has no inner edge.

        An image that wraps continues at its sides, as far as the halos reach.
        """
        if self.wrap is not None:
            return True
        one_strip = self.is_banded and self.strip >= self.size[1]
        return not one_strip or self.roi.width != self.canvas[1]

    @property
    def wrap(self) -> str | None:
        """Axes along which the image repeats without a seam: x, y or both; None if there is none."""
        return wrap_name(self.stages[0].period)

    @property
    def scene(self) -> Sides:
        """(height, width) of the base image without its margin."""
        return tuple(
            n if period else n - 2 * self.margin for n, period in zip(self.base, self.stages[0].period, strict=True)
        )  # type: ignore[return-value]

    @property
    def margin(self) -> int:
        """Pixels along each side of the base image that lie outside the canvas."""
        pixels = 0
        for stage in reversed(self.stages):
            pixels = stage.margin + pixels // stage.scale
        return pixels

    @property
    def pyramid(self) -> tuple[tuple[int, int], ...]:
        """Sizes of the pyramid's levels: each half of the one before, rounded up, until one chunk holds it."""
        return pyramid_of(self.size, self.chunk)

    def grid(self, level: int = 0) -> Grid:
        """Shards of a level of the pyramid."""
        return Grid(*self.pyramid[level], self.shard)

    def writes(self) -> Writes:
        """Boxes that are written in one go, in output pixels, without a list of them.

        For bands: a row of shards of a strip, strip after strip. For tiles: whole tiles of the last stage, or whole shards
        of a region.
        """
        if self.is_banded:
            return Writes.of(Grid(*self.size, (self.shard[0], self.strip)), by_columns=True)
        cell = self.stages[-1].grid.cell if self.writes_tiles else self.shard
        return Writes.of(Grid(*self.size, cell), by_columns=False)

    @property
    def writes_tiles(self) -> bool:
        """Whether a write is a whole tile of the last stage."""
        return not self.is_banded and self.is_whole and self.is_direct

    @property
    def strip(self) -> int:
        """Output columns of a strip of bands: all, or whole shards."""
        enlarged = self.stages[-1].tile * self.stages[-1].scale
        if self.is_direct:
            return enlarged
        columns = enlarged * self.canvas[1] // self.reduction.source[1]
        return columns if columns >= self.size[1] else max(1, columns // self.shard[1]) * self.shard[1]

    def column_strips(self) -> Iterator[tuple[int, int]]:
        """Half-open range of output columns of every strip."""
        return ((x, min(x + self.strip, self.size[1])) for x in range(0, self.size[1], self.strip))

    def input_columns(self, strip: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Half-open range of LR columns that every stage, first stage first, reads for a strip of the output."""
        first, last = self.reduction.columns.read(*(x + self.roi.x0 for x in strip))
        columns = []
        for stage in reversed(self.stages):
            columns.append(stage.input_columns(first, last))
            first, last = stage.source_columns(columns[-1])
        return tuple(reversed(columns))

    def tiles_to_run(self, writes: Iterable[Box] | None = None) -> tuple[int, ...]:
        """Number of tiles that each stage runs, first stage first, for these boxes of whole writes; for all without."""
        if writes is None and self.is_whole:
            return self._all_tiles()
        written = self.writes().rectangles if writes is None else writes
        counts: list[int] = []
        boxes: Iterable[Box] = (self.reduction.read(box.shift(self.roi.y0, self.roi.x0)) for box in written)
        for stage in reversed(self.stages):
            rows = stage.with_blended(spans_of(stage.grid, boxes))
            counts.append(sum(last - first for spans in rows.values() for first, last in spans))
            boxes = [stage.source_of(row, *span) for row, spans in rows.items() for span in spans]
        return tuple(reversed(counts))

    def _all_tiles(self) -> tuple[int, ...]:
        """Counts without a list of tiles, so that an absurd size is refused at once.

        A whole image needs a box of its source that begins with its first tile's input and ends with its last tile's.
        """
        counts, box = [], self.reduction.read(Box(0, 0, *self.canvas))
        for stage in reversed(self.stages):
            cells = stage.grid.covered(box)
            counts.append(cells.area)
            first, last = (stage.source_of(row, cells.x0, cells.x1) for row in (cells.y0, cells.y1 - 1))
            box = Box(first.y0, first.x0, last.y1, last.x1)
        return tuple(reversed(counts))

    def to_json(self) -> dict[str, Any]:
        """The plan under the keys of the stored format."""
        values = {
            **asdict(self),
            "stages": [stage.to_json() for stage in self.stages],
            "shard": stored_sides(self.shard),
            "chunk": stored_sides(self.chunk),
        }
        # Values of these fields are absent from the plans of earlier versions.
        del values["pixels"]
        values |= self.pixels.to_json()
        for name in ("enlarged", "profile"):
            if values[name] is None:
                del values[name]
        if not self.noise_gain:
            del values["noise_gain"]
        if self.wrap is not None:
            values["wrap"] = self.wrap
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan of its stored form, also that of earlier versions. Raises KeyError, TypeError or ValueError for damage."""
        enlarged, pixels = data.get("enlarged"), pixels_of(data)
        *inner, last = (StagePlan.from_json(stage) for stage in data["stages"])
        values = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        values |= {name: sides_of(data[name]) for name in ("canvas", "base", "shard", "chunk")}
        return cls(
            **values
            | {
                "stages": (*inner, replace(last, is_image=enlarged is None and pixels.is_plain)),
                "roi": Box(**data["roi"]),
                "executor": executor_of(data),
                "enlarged": None if enlarged is None else sides_of(enlarged),
                "pixels": pixels,
                "noise_gain": tuple(data.get("noise_gain", ())),
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the stored form."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Names and values of the fields in which a stored plan differs from this one.

        Keys that this version does not store are ignored: earlier versions kept measurements in the plan. So are halos
        that decide no pixel.
        """
        later: dict[str, Any] = {"enlarged": None, "profile": None, "wrap": None}
        later |= {"channels": PLAIN.channels, "depth": PLAIN.depth, "noise_gain": [1.0] * len(self.stages)}
        here, there = {**later, **self.to_json()}, {**later, **stored, "executor": executor_of(stored)}
        stages = there.get("stages")
        if isinstance(stages, list) and len(stages) == len(self.stages):
            here["stages"] = [{"statistics": "", **stage} for stage in here["stages"]]
            stages = [{"statistics": "", **stage} if isinstance(stage, dict) else stage for stage in stages]
            there["stages"] = [_only(old, new) for old, new in zip(stages, here["stages"], strict=True)]
            if not self.needs_halos:
                for stage in (*here["stages"], *(s for s in there["stages"] if isinstance(s, dict))):
                    stage.pop("halo", None)
        return [f"{k}: {_difference(there.get(k), v)}" for k, v in here.items() if there.get(k) != v]


def wrap_name(axes: Sequence[object]) -> str | None:
    """Name of the axes (rows, columns) that are true: y, x or both; None if none is."""
    return {(True, True): "both", (True, False): "y", (False, True): "x"}.get((bool(axes[0]), bool(axes[1])))


def executor_of(stored: dict[str, Any]) -> str:
    """Name of the executor in a stored plan, by its present name."""
    name = str(stored.get("executor"))
    return RENAMED_EXECUTORS.get(name, name)


def _only(stage: object, keys: dict[str, Any]) -> object:
    return {k: v for k, v in stage.items() if k in keys} if isinstance(stage, dict) else stage


def _difference(there: object, here: object) -> str:
    """Two values; for two lists of stages, whose text is long, the first field that differs."""
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, (old, new) in enumerate(zip(there, here, strict=True)):
            if isinstance(old, dict) and isinstance(new, dict) and old != new:
                key = next(k for k in {**new, **old} if old.get(k) != new.get(k))
                return f"{key} of step {step_of(index)} {_brief(old.get(key))} there, {_brief(new.get(key))} here"
    return f"{_brief(there)} there, {_brief(here)} here"


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
