"""How far a network looks that the engine has no code of: found by runs, never by its name.

A network is *local* if the far part of a picture changes nothing. It looks through *statistics* if it is local with the results
of a few operations (``engine.run.statistics``) as constants. Otherwise it looks at the *whole* picture, and its tiles have an
error that no halo removes. That error, and the error of recorded statistics, is measured against the whole picture on a part
that fits the memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from engine.geometry import Box
from engine.io.photo import Source, TensorSource
from engine.plan.measured import Reach, WholeError
from engine.plan.stage import StagePlan, Tile
from engine.probe.seam import far_effect
from engine.run.pipeline import tile_chain
from engine.run.stage import TAIL_CHUNKS, Stage
from engine.run.statistics import Core, Recorder, Shape, Site, Statistics, averaged
from engine.run.tiles import TiledStage

FAR_LEVELS = 0.5
"""Effect of the far half of a picture, in levels of 255, from which on a network is said to look at the whole."""

CORE = 128
"""Side of the tiles that are recorded, without halo, in LR pixels."""

PART = 256
"""Side of the part of the picture that the error is measured on, in LR pixels, which is four tiles."""

PASSES = 8
"""Largest number of passes over the tiles whose statistics are recorded."""

SETTLED = 0.05
"""Movement of a tile's output, in levels of 255, below which no further pass is made."""

MAX_TILES = 32
"""Largest number of tiles that are recorded; of more, a sample evenly apart."""

Levels = tuple[float, float]
"""(mean, largest) error in levels of 255."""

_T = TypeVar("_T")

Log = Callable[[str], None]

Network = Callable[[Tensor], Tensor]


def on_picture(stage: Stage) -> Callable[[Tensor], Network]:
    """Function from a picture [1, inputs, h, w] to the network with the statistics of that picture as constants."""

    def frozen(picture: Tensor) -> Network:
        shape = (picture.shape[2], picture.shape[3])
        if not stage.sites:
            return partial(stage.run, tail_chunks=TAIL_CHUNKS)
        with Recorder(Statistics(stage.sites, shape, {}), Core(Box(0, 0, *shape), shape)) as recorder:
            stage.run(picture, TAIL_CHUNKS)
        statistics = Statistics(stage.sites, shape, averaged([recorder.moments]))
        return partial(stage.with_statistics(statistics).run, tail_chunks=TAIL_CHUNKS)

    return frozen


def is_local(stage: Stage, picture: Tensor) -> bool:
    """Whether the far half of a picture moves the other end by less than ``FAR_LEVELS``, its statistics being constants."""
    effect, _ = far_effect(on_picture(stage)(picture), picture, stage.scale, stage.align)
    return effect <= FAR_LEVELS


@dataclass(frozen=True, slots=True)
class Recorded:
    """Statistics of a stage and the error of its tiles."""

    statistics: Statistics | None
    """None for a network without any."""
    error: WholeError | None
    """None for a network that is local."""


def record_stages(
    cuts: Sequence[StagePlan],
    stages: Sequence[Stage],
    reaches: Sequence[Reach],
    base: Source,
    seed: int,
    sides: Sequence[int],
    log: Log = lambda _: None,
) -> list[Recorded]:
    """Record the statistics of all stages that have any, and measure the error of tiles against the whole picture.

    Args:
        cuts: stages with their halos.
        stages: their networks.
        reaches: how far the networks look.
        base: the base image.
        seed: seed of all noise.
        sides: side of the largest tile of each stage that fits the memory, in LR pixels.
        log: receives a line for each pass.
    """
    found: list[Recorded] = []
    with ExitStack() as stack:
        source = base
        for cut, stage, reach, side in zip(cuts, stages, reaches, sides, strict=True):
            core = max(cut.align, min(CORE, side - 2 * cut.halo) // cut.align * cut.align)
            cut = cut.with_core((core, core))
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-statistics-")))
            recorded = Recorded(None, None)
            if reach != "local":
                sites = stage.sites if reach == "statistics" else {}
                error = whole_error(cut, stage, sites, source, seed, side, scratch / "part")
                statistics = None
                if sites:
                    statistics, sampling = record(_tiled(cut, stage, source, seed, scratch / "whole"), sites, log)
                    error = replace(error, mean=error.mean + sampling[0], max=error.max + sampling[1])
                    stage = stage.with_statistics(statistics)
                log(
                    f"{cut.name}: tiles differ from the whole picture by {error.mean:.3f} levels on average, {error.max:.2f} at "
                    f"most ({error.shape[1]}x{error.shape[0]} px of it)"
                )
                recorded = Recorded(statistics, error)
            found.append(recorded)
            source = _tiled(cut, stage, source, seed, scratch)
    return found


def _tiled(cut: StagePlan, stage: Stage, source: Source, seed: int, scratch: Path) -> TiledStage:
    (image,) = tile_chain([cut], [stage], source, seed=seed, scratch=scratch)
    return image


def whole_error(
    cut: StagePlan,
    stage: Stage,
    sites: Mapping[int, Site],
    source: Source,
    seed: int,
    side: int,
    scratch: Path,
) -> WholeError:
    """Error of tiles, with the statistics of these sites recorded from them, on the middle of a stage's input.

    The part is at least four halos wide where the memory permits, so that its quarters are really cut.
    """
    largest = min(side, max(PART, 4 * cut.halo))
    height, width = (min(largest, n) for n in source.size)
    y, x = ((n - k) // 2 for n, k in zip(source.size, (height, width), strict=True))
    part = TensorSource(source.read(Box(y, x, y + height, x + width)))
    core = max(cut.align, largest // 2 // cut.align * cut.align)
    cut = replace(cut, height=height, width=width, margin=0, blend=0, is_image=False).with_core((core, core))
    whole = _tiled(cut.with_core(cut.padded), stage, part, seed, scratch / "one")
    tiles = _tiled(cut, stage, part, seed, scratch / "record")
    if sites:
        statistics, _ = record(tiles, sites)
        tiles = _tiled(cut, stage.with_statistics(statistics), part, seed, scratch / "tiles")
    everything = Box(0, 0, *tiles.size)
    difference = (tiles.read(everything) - whole.read(everything)).abs() * 255
    return WholeError(round(float(difference.mean()), 4), round(float(difference.max()), 3), (height, width), cut.halo)


def record(image: TiledStage, sites: Mapping[int, Site], log: Log = lambda _: None) -> tuple[Statistics, Levels]:
    """Statistics of a stage's whole input, from tiles of it.

    A tile that was computed with its own statistics gives the first site exactly. Tiles with the constants of the pass before
    give each further site more exactly, until a tile's output moves by less than ``SETTLED``.

    Args:
        image: the stage, whose plan has the tiles that are recorded.
        sites: its network's sites.
        log: receives a line for each pass.

    Returns:
        The statistics, and the (mean, largest) error of a sample of the tiles: half of the difference that the statistics of
        each half of it make to a tile; 0 where all tiles were recorded.
    """
    plan = image.plan
    indices = list(plan.grid.indices())
    tiles = [plan.tile_at(*index) for index in spread(indices, MAX_TILES)]
    last_row, last_column = indices[-1]
    cores = [
        _core(tile, plan.scale, plan.tile_shape, last=(tile.row == last_row, tile.column == last_column))
        for tile in tiles
    ]
    statistics = Statistics(sites, plan.padded, {})
    first = image.gather_input(image.read_input(tiles[0]), tiles[0])
    before: Tensor | None = None
    for number in range(PASSES):
        records = []
        for tile, core in zip(tiles, cores, strict=True):
            with Recorder(statistics, core) as recorder:
                output = image.stage.run(image.gather_input(image.read_input(tile), tile))
            records.append(recorder.moments)
            if tile is tiles[0]:
                after = output
        statistics = Statistics(sites, plan.padded, averaged(records))
        # Not the tiles of the render, whose constants they become.
        log(
            f"{plan.name}: statistics from {len(tiles)} of {len(indices)} parts of {plan.core_text} px, pass {number + 1}"
        )
        if before is not None and float((after - before).abs().max()) * 255 < SETTLED:
            break
        before = after
    if len(tiles) == len(indices):
        return statistics, (0.0, 0.0)
    halves = [Statistics(sites, plan.padded, averaged(records[k::2])) for k in (0, 1)]
    one, other = (image.stage.with_statistics(half).run(first) for half in halves)
    difference = (one - other).abs() * (255 / 2)
    return statistics, (round(float(difference.mean()), 4), round(float(difference.max()), 3))


def _core(tile: Tile, scale: int, shape: Shape, *, last: tuple[bool, bool]) -> Core:
    """The part of a tile that it alone is recorded for. At the picture's border it reaches the tile's."""
    y0, x0, y1, x1 = (n // scale for n in (tile.crop.y0, tile.crop.x0, tile.crop.y1, tile.crop.x1))
    return Core(Box(y0, x0, shape[0] if last[0] else y1, shape[1] if last[1] else x1), shape)


def spread(items: Sequence[_T], count: int) -> list[_T]:
    """At most ``count`` items, evenly apart."""
    chosen = min(count, len(items))
    return [items[(2 * k + 1) * len(items) // (2 * chosen)] for k in range(chosen)]
