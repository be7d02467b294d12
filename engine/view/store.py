"""A store as the viewer shows it: finished, or growing in this or in another process."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InputError, StorageError
from engine.geometry import Box
from engine.growing import GrowingImage, Pixels, Tile
from engine.io.objects import ObjectPath, Place
from engine.plan.sides import sides_of
from engine.store import resume_command
from engine.view.source import State

_MAX_TEXT, _MAX_TEXTS = 500, 50
"""Characters of a text of the metadata, and texts of a list, that the page gets."""

_HISTORY = 24
"""Observations from which the speed is computed."""


@dataclass(frozen=True, slots=True)
class Report:
    """Progress that the rendering process told; it is finer than whole shards."""

    share: float
    seconds_left: float | None
    time: float
    """Time of the report, of ``time.monotonic``."""


class StoreSource:
    """A store.

    Args:
        path: folder or URL of a render, or of another program's OME-Zarr image.
        name: name for the page.

    Attributes:
        path: the folder or URL.
        report: the last progress that the rendering process told, if it did.

    Raises:
        InputError: the folder is no such image, or is damaged.
    """

    def __init__(self, path: Place, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name
        self.report: Report | None = None
        self._image = GrowingImage(path)
        self._told: tuple[int | None, Report | None, int, int] | None = None
        """Writer, report, number of damaged shards and epoch at the last ``refresh``."""
        self._gone: str | None = None
        self._history: list[tuple[float, int]] = []
        """Times and finished pixels; never changed in place, as several threads read it."""
        self._writer = self._image.writer
        self._observe(_last_write(path))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((level.width, level.height) for level in self._image.levels)

    @property
    def grows(self) -> bool:
        return not self._image.complete

    def describe(self) -> dict[str, Any]:
        provenance = dict(self._image.pyramid.provenance)
        plan = provenance.get("plan")
        facts = {
            "kind": "store" if provenance else "foreign store",
            "samples": str(self._image.pyramid.pixels),
            "shard": list(self._image.levels[0].shard),
            "chunk": list(self._image.levels[0].chunk),
            "engine": _text(provenance.get("engine")),
            "model": _text(provenance.get("model")),
            "licences": _texts(provenance.get("licences")),
            "seamError": _number(provenance.get("seam_error_levels")),
            "precisionError": _numbers(provenance.get("precision_error_levels"), ("mean", "p999", "max")),
        }
        return facts | (_plan_facts(plan) if isinstance(plan, dict) else {})

    def version(self, level: int, x: int, y: int) -> str:
        return self._image.version(level, x, y)

    def tile(self, level: int, x: int, y: int) -> Tile:
        return self._image.tile(level, x, y)

    def read(self, box: Box) -> Pixels:
        return self._image.decode(0, box)

    def show(self, look: Pixels) -> None:
        """Show a better small image of the whole where nothing is finished."""
        self._image.show(look)

    def refresh(self) -> bool:
        try:
            changed = self._image.refresh()
        except (InputError, StorageError) as error:
            changed, self._gone = str(error) != self._gone, str(error)
            return changed
        if changed:
            self._observe()
        if self._gone is not None:
            self._gone, changed = None, True
        writer = self._image.writer
        now = (writer, self.report, len(self._image.damaged), self._image.epoch)
        changed |= now != self._told
        self._writer, self._told = writer, now
        return changed

    @property
    def state(self) -> State:
        finished = self._image.finished
        problems = (*((self._gone,) if self._gone else ()), *sorted(self._image.damaged)[:3])
        if self._image.complete:
            missing = int(finished.size - finished.sum())
            if missing:
                problems = (*problems, f"{missing} of {finished.size} shards are missing; engine check tells more")
        complete = self._image.complete
        running = None if complete else True if self.report is not None or self._writer is not None else self._is_active
        return State(
            complete=complete,
            running=running,
            share=1.0 if complete else max(self._share, self.report.share if self.report else 0.0),
            seconds_left=None if complete or running is False else self._seconds_left,
            cells=(finished.shape[0], finished.shape[1]),
            cell=self._image.levels[0].shard,
            finished=finished,
            epoch=self._image.epoch,
            problems=problems,
            resume=None if complete or running else resume_command(self.path, self._image.pyramid.provenance),
        )

    @property
    def _share(self) -> float:
        return float(_areas(self._image)[self._image.finished].sum() / self._image.levels[0].bounds.area)

    @property
    def _is_active(self) -> bool:
        """Whether a shard was written not long ago, where the system does not tell who writes."""
        times = [at for at, _ in self._history]
        return bool(times) and time.time() - times[-1] < max(60.0, 5 * float(np.diff(times).max(initial=0.0)))

    @property
    def _seconds_left(self) -> float | None:
        """Time to the end: as told by the render, or from the times at which shards were written."""
        if self.report is not None:
            left = self.report.seconds_left
            return None if left is None else max(0.0, left - (time.monotonic() - self.report.time))
        history = self._history
        if not history:
            return None
        (first, before), (last, now) = history[0], history[-1]
        if now <= before or last <= first:
            return None
        left = (self._image.levels[0].bounds.area - now) * (last - first) / (now - before)
        return max(0.0, left - max(0.0, time.time() - last))

    def _observe(self, now: float | None = None) -> None:
        """Note how many pixels are finished; ``now``: time at which they were, by default the present."""
        if not self._image.complete:
            area = int(_areas(self._image)[self._image.finished].sum())
            if not self._history or area != self._history[-1][1]:
                self._history = [*self._history, (now or time.time(), area)][-_HISTORY:]


def _areas(image: GrowingImage) -> NDArray[np.int64]:
    """Pixels of every shard of the full-size image, [rows, columns]."""
    level = image.levels[0]
    rows, columns = (
        np.diff(np.minimum(np.arange(count + 1) * side, length))
        for count, side, length in zip(image.finished.shape, level.shard, level.bounds.shape, strict=True)
    )
    areas: NDArray[np.int64] = np.outer(rows, columns)
    return areas


def _plan_facts(plan: dict[str, Any]) -> dict[str, Any]:
    """Facts of a stored plan; those that are damaged are left out."""
    facts: dict[str, Any] = {key: _text(plan.get(key)) for key in ("seed", "executor", "precision", "backend")}
    gains = plan.get("noise_gain")
    facts["noiseGain"] = [_number(gain) for gain in gains[:_MAX_TEXTS]] if isinstance(gains, list) else []
    try:
        height, width = map(int, plan["canvas"])
        y0, x0, y1, x1 = (int(plan["roi"][key]) for key in ("y0", "x0", "y1", "x1"))
        facts |= {"canvas": [width, height], "roi": [x0, y0, x1 - x0, y1 - y0]}
        enlarged = [int(side) for side in plan.get("enlarged") or (height, width)]
        facts["steps"] = []
        for stage in plan["stages"]:
            core, scale = sides_of(stage["core"]), int(stage["scale"])
            facts["steps"].append(
                {
                    "scale": scale,
                    "halo": int(stage["halo"]),
                    "band": int(stage.get("band", 0)),
                    "tile": [core[1], core[0]],
                    "input": [int(stage["width"]), int(stage["height"])],
                }
            )
        last = facts["steps"][-1]
        down, across = height / enlarged[0], width / enlarged[1]
        origin = [-x0, -y0]
        if last["band"]:
            facts["bands"] = {"origin": origin, "size": [last["tile"][0] * scale * across, last["band"] * scale * down]}
        else:
            facts["tiles"] = {"origin": origin, "size": [side * scale * down for side in last["tile"]]}
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        pass
    return facts


def _last_write(path: Place) -> float:
    """Time at which a file of the store was last made, as far as its folders or objects tell."""
    if isinstance(path, ObjectPath):
        return max((about["last_modified"].timestamp() for _, about in (path / "0").objects()), default=0.0)
    times = [0.0]
    for folder in (path, *path.glob("0/c/0/*")):
        with suppress(OSError):
            times.append(folder.stat().st_mtime)
    return max(times)


# Metadata come from a file: the page gets what it expects, or nothing.


def _text(value: object) -> str | None:
    return str(value)[:_MAX_TEXT] if isinstance(value, str | int) else None


def _texts(values: object) -> list[str]:
    return [text for value in values[:_MAX_TEXTS] if (text := _text(value))] if isinstance(values, list) else []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _numbers(values: object, keys: tuple[str, ...]) -> dict[str, float] | None:
    numbers = {key: _number(values.get(key)) for key in keys} if isinstance(values, dict) else {}
    known = {key: number for key, number in numbers.items() if number is not None}
    return known if len(known) == len(keys) else None
