"""Exploration of a model: samples of seeds, and one image of which only what is looked at is computed.

The page of ``engine view`` asks and looks (``engine.view.model``), one thread computes. Each request replaces the one before,
so that what nobody looks at any more is forgotten. What is computed is kept in stores that ``engine render --resume`` finishes.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from PIL import Image

from engine.archs.layers import RGB
from engine.errors import BudgetError, EngineError, ResumeError, UsageError, printable
from engine.geometry import Box
from engine.io.objects import Place
from engine.io.provenance import COMMAND
from engine.io.store_name import remove_store
from engine.io.zarr_store import ZarrSink
from engine.job import Job
from engine.lazy import MAX_VIEW, LazyRender, crop_about, lazy_job, louder_job
from engine.model.bundle import Model
from engine.plan.canvas import first_enlargement
from engine.plan.cost import readable
from engine.plan.request import MAX_NOISE_GAIN, MAX_SEED, Request

SAMPLE = 256
"""Longer side of a sample, in pixels: about that of step 1's images."""

SAMPLES = 160
"""Most samples that are wanted at the same time; as many fit into the cache."""

NEAR = 4_000_000
"""Pixels of a view whose shards are computed before the first enlargement of the whole image: a screen at 70 %."""

SAMPLE_BYTES = SAMPLES * SAMPLE**2 * 3
"""Size of the cache of samples."""

PAGE_BYTES = 256 << 20
"""Memory of the page's server beside the render: samples, caches of tiles and cells (docs/viewer.md), and its modules."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Crop:
    """A small part of the image with a noise gain."""

    number: int
    gain: float
    box: Box
    pixels: Pixels | None
    """uint8 [h, w, 3]; None where they cannot be computed."""
    problem: str | None
    """The reason, in words."""

    def to_json(self) -> dict[str, Any]:
        """The crop without its pixels, as the page gets it."""
        place = [self.box.x0, self.box.y0, self.box.width, self.box.height]
        return {"number": self.number, "gain": self.gain, "box": place, "problem": self.problem}


class Exploration:
    """A model that is explored.

    Args:
        model: model with step 1.
        request: size, first seed of the samples, and options of all renders.
        folder: folder of the stores.
        command: words of the command that finishes the store of a request, without its output.
        log: receives a line before each measurement.

    Attributes:
        on_change: called after every change, by the thread that computes.
        canvas: number and folder of the store that is looked at; None while there is none. Every store has another number.
        look: the first enlargement of that image, where it is computed: uint8 [h, w, 3].

    Raises:
        UsageError: the model has no step 1.
        EngineError: as ``Job.prepare``; BudgetError: the render and the page do not fit ``--memory``.
    """

    def __init__(
        self,
        model: Model,
        request: Request,
        folder: Path,
        command: Callable[[Request], Sequence[str]],
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if model.base_size is None:
            raise UsageError(f"{model.path}: has no step 1 to view images of; enlarge a picture with engine upscale")
        self._model, self._request, self._folder, self._command = model, request, folder, command
        self._log = log
        self.on_change: Callable[[], None] = lambda: None
        self.canvas: tuple[int, Place] | None = None
        self.look: Pixels | None = None
        self._lazy: LazyRender | None = None
        self._number = 0
        self._first_seed = request.seed
        self._wish: tuple[int | None, Request] | None = None
        self._crop_wish: tuple[float, int, int] | None = None
        """Noise gain of a crop, and the place that it is about."""
        self._crop: _Crop | None = None
        """The last crop."""
        self._is_cropping = False
        self._wanted_seeds = range(0)
        self._samples: LRUCache[tuple[int, int], Pixels] = LRUCache(
            SAMPLE_BYTES, getsizeof=lambda pixels: pixels.nbytes
        )
        self._sheet = 0
        """Number of the shape that the samples have."""
        self._since: tuple[float, int] | None = None
        """Time at which the whole render began here, and the shards that were missing."""
        self._note = ""
        """Words about what is planned."""
        self._problem: str | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._plain, self._job = self._planned(request)
        """The render as the model is, and with its noise gain."""
        self._note = ""
        self._thread = threading.Thread(target=self._run, name="explore", daemon=True)

    def start(self) -> None:
        """Begin to compute what is asked for."""
        self._thread.start()

    def close(self) -> str | None:
        """End after the shard that is being computed; a store without a shard is removed. Returns ``command``."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        command = self.command
        self._leave()
        with suppress(OSError):
            self._folder.rmdir()  # unless it holds a store
        return command

    # What the page asks for, from any thread

    def want_samples(self, first: int, count: int) -> None:
        """Compute the samples of these seeds, and forget others that were wanted."""
        with self._changed:
            self._wanted_seeds = range(first, min(first + min(count, SAMPLES), MAX_SEED + 1))
            self._changed.notify_all()

    def open(self, seed: int | None, size: str | None, gain: float | None = None) -> None:
        """Leave the present image for that of a seed, or for samples (None), of a size such as ``4096x3072``.

        Args:
            seed: the seed.
            size: the size; None: the present one.
            gain: loudness of the noise channels; None: the present one.

        Raises:
            UsageError: a seed, a size or a gain that no render takes.
        """
        with self._changed:
            changes: dict[str, Any] = {} if size is None else {"size": size}
            if gain is not None:
                changes["noise_gain"] = gain
            request = replace(self._request, **changes)
            self._wish = seed, replace(request, seed=self._request.seed if seed is None else seed)
            self._problem = None
            self._changed.notify_all()

    def view(self, box: Box | None) -> None:
        """Compute what is missing of a view, in pixels of the image, and forget the view before; None: nobody looks."""
        with self._changed:
            if self._lazy is not None:
                self._lazy.look(box)
            self._changed.notify_all()

    def want_crop(self, gain: float, x: int, y: int) -> None:
        """Compute a small part of the image about a pixel with another noise gain, and forget the one that was wanted before.

        Raises:
            UsageError: a gain that no render takes.
        """
        Request(noise_gain=gain)
        with self._changed:
            self._crop_wish = (gain, x, y) if self._lazy is not None else None
            self._changed.notify_all()

    def crop(self, number: int) -> Pixels | None:
        """The crop of this number, uint8 [h, w, 3], if it is the last one."""
        crop = self._crop
        return crop.pixels if crop is not None and crop.number == number else None

    def render(self, *, is_wanted: bool) -> None:
        """Compute the rest of the image, or stop it. What is looked at comes first."""
        with self._changed:
            if self._lazy is not None:
                self._lazy.wants_all = is_wanted
                self._since = (time.monotonic(), self._lazy.missing) if is_wanted else None
                self._problem = None
            self._changed.notify_all()

    def sample(self, sheet: int, seed: int) -> Pixels | None:
        """The image that step 1 makes of a seed, uint8 [h, w, 3], if it is there."""
        with self._changed:
            return self._samples.get((sheet, seed))

    @property
    def command(self) -> str | None:
        """Command that finishes the store that is looked at; None if it is complete or empty."""
        canvas, lazy = self.canvas, self._lazy
        if canvas is None or lazy is None or not lazy.missing or not lazy.has_shards:
            return None
        return shlex.join([*self._command(self._kept(self._job.request)), "--out", str(canvas[1]), "--resume"])

    @property
    def state(self) -> dict[str, Any]:
        """What the page shows, as JSON: see ``ModelState`` in viewer/src/api.ts."""
        with self._changed:
            height, width = self._job.plan.size
            lazy = self._lazy
            return {
                "name": self._model.path.stem,
                "size": [width, height],
                "sizes": [list(size) for size in self._sizes],
                "seed": None if self.canvas is None else str(self._job.plan.seed),
                "gain": self._gain if any(stage.inputs > RGB for stage in self._job.measured.stages) else None,
                "maxGain": MAX_NOISE_GAIN,
                "crop": None if self._crop is None else self._crop.to_json(),
                "cropping": self._is_cropping or self._crop_wish is not None,
                "firstSeed": str(self._first_seed),
                "sheet": self._sheet,
                "samples": [str(seed) for seed in self._wanted_seeds if (self._sheet, seed) in self._samples],
                "opening": self._note or (None if self._wish is None else "planning"),
                "computing": lazy is not None and self._problem is None and lazy.wanted is not None,
                "rendering": lazy is not None and lazy.wants_all and lazy.missing > 0,
                "secondsLeft": self._seconds_left,
                "command": self.command,
                "problem": self._problem,
                "maxView": MAX_VIEW,
            }

    @property
    def _gain(self) -> float:
        """Loudness of the noise channels, by that of the model."""
        return max(self._job.request.noise_gain or (1.0,))

    @property
    def _seconds_left(self) -> float | None:
        lazy, since = self._lazy, self._since
        if lazy is None or since is None or lazy.missing >= since[1]:
            return None
        return (time.monotonic() - since[0]) / (since[1] - lazy.missing) * lazy.missing

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """(width, height) after every step, in the shape of the present image."""
        assert self._model.base_size is not None
        scales = [stage.scale for stage in self._model.stages]
        height, width = first_enlargement(self._job.plan.size, self._model.base_size, scales[0])
        factors = [factor // scales[0] for factor in accumulate(scales, mul)]
        return [(width * factor, height * factor) for factor in factors]

    # The thread that computes

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except EngineError as error:
                self._problem = error.for_command_line()  # until the page asks for something else
            except (OSError, MemoryError) as error:
                self._problem = printable(str(error)) or "the memory is exhausted"
            self.on_change()

    def _next(self) -> Callable[[], object] | None:
        """The next task, once there is one; None at the end."""
        with self._changed:
            while not self._is_closed:
                if (task := self._task()) is not None:
                    return task
                self._changed.wait()
        return None

    def _task(self) -> Callable[[], object] | None:
        if self._wish is not None:
            (seed, request), self._wish, self._note = self._wish, None, "planning"
            return partial(self._open, seed, request)
        if self._crop_wish is not None:
            wish, self._crop_wish, self._is_cropping = self._crop_wish, None, True
            return partial(self._draw_crop, *wish)
        if self._problem is not None:
            return None
        for seed in self._wanted_seeds:
            if (self._sheet, seed) not in self._samples:
                return partial(self._draw_sample, seed)
        if self._lazy is None:
            return None
        view = self._lazy.view
        is_near = view is not None and view.area <= NEAR
        if self.look is None and self._is_enlarged_twice and self._lazy.missing and not is_near:
            return self._draw_look
        return self._lazy.step if self._lazy.wanted is not None else None

    @property
    def _is_enlarged_twice(self) -> bool:
        """Whether the first enlargement is another image than the present one, of the same scene."""
        return len(self._job.plan.stages) > 1 and self._job.measured.canvas.keeps_scene

    def _planned(self, request: Request, like: Job | None = None) -> tuple[Job, Job]:
        """The plans of a request as the model is, and with its noise gain, beside the page's memory."""
        memory = request.memory
        planned = request if memory is None else replace(request, memory=max(10**6, memory - PAGE_BYTES))
        try:
            without_gain = replace(planned, noise_gain=None)
            plain = lazy_job(self._model, without_gain, self._folder / "out.zarr", self._say, like=like)
            job = louder_job(plain, planned.noise_gain)
            job.check()
        except BudgetError as error:
            if memory is None:
                raise
            raise BudgetError(f"{error.args[0]}; add {readable(PAGE_BYTES)} for the page") from error
        return plain, job

    def _kept(self, planned: Request) -> Request:
        """A planned request with the memory that the user gave."""
        return replace(planned, memory=self._request.memory)

    def _say(self, line: str) -> None:
        self._log(line)
        self._note = line
        self.on_change()

    def _open(self, seed: int | None, request: Request) -> None:
        """Leave the present image, plan another one and open its store."""
        self.on_change()
        try:
            plain, job = self._planned(request, self._plain)
            self._leave()
            lazy = None
            if seed is not None:
                job, sink = self._opened(job, seed)
                lazy = LazyRender(job, sink)
            with self._changed:
                self._sheet += job.plan.base != self._job.plan.base
                self._plain, self._job, self._request, self._lazy = plain, job, request, lazy
                if lazy is not None:
                    self._number += 1
                    self.canvas = self._number, job.out
        finally:
            self._note = ""

    def _opened(self, job: Job, seed: int) -> tuple[Job, ZarrSink]:
        """The store of an image: the one of before, or a new one of another name where that cannot be continued."""
        height, width = job.plan.size
        gain = "" if job.request.noise_gain is None else f"-gain{max(job.request.noise_gain):g}"
        name = f"{self._model.path.stem}-{seed}-{width}x{height}{gain}"
        words = list(self._command(self._kept(job.request)))
        for number in range(1, 10):
            attempt = copy(job)  # which adopts what a store has
            attempt.out = self._folder / f"{name}{'' if number == 1 else f'-{number}'}.zarr"
            with suppress(ResumeError):
                return attempt, attempt.open_sink(resume=True, notes={COMMAND: words})
        raise ResumeError(f"{self._folder / name}.zarr: belongs to another render, as do nine of such names; move them")

    def _leave(self) -> None:
        """Close the present store, and remove it if nothing was computed."""
        with self._changed:
            lazy, canvas = self._lazy, self.canvas
            self._lazy = self.canvas = self.look = self._since = self._crop_wish = self._crop = None
        if lazy is None or canvas is None:
            return
        self.on_change()
        lazy.close()
        if not lazy.has_shards:
            path = canvas[1]
            assert isinstance(path, Path)  # in the local folder of the images
            with suppress(EngineError, OSError):
                remove_store(path)

    def _draw_sample(self, seed: int) -> None:
        sample = Image.fromarray(self._job.base_image(seed))
        sample.thumbnail((SAMPLE, SAMPLE), Image.Resampling.BOX)
        with self._changed:
            self._samples[self._sheet, seed] = np.asarray(sample)

    def _draw_crop(self, gain: float, x: int, y: int) -> None:
        """Compute a crop in the memory of the render, whose streams of bands start again after it."""
        assert self._lazy is not None
        self._lazy.rest()
        pixels, box = None, crop_about(self._plain.plan, x, y)
        problem: str | None = "not computed"
        try:
            job = self._job if gain == self._gain else louder_job(self._plain, None if gain == 1 else (gain,))
            job.check()
            pixels, problem = np.ascontiguousarray(job.crop(box).transpose(1, 2, 0)), None
        except EngineError as error:
            problem = error.for_command_line()
        finally:
            with self._changed:
                self._is_cropping = False
                self._number += 1
                self._crop = _Crop(self._number, gain, box, pixels, problem)

    def _draw_look(self) -> None:
        """Compute the first enlargement, which is shown where nothing else is computed."""
        job = self._job
        request = replace(
            job.request, size=self._sizes[0], precision=job.measured.precisions[0], depth=None, dither=False
        )
        small = Job.prepare(self._model, request, job.out.with_name(f"{job.out.name}.look"), like=job)
        small.check()
        self.look = np.ascontiguousarray(small.pixels(job.plan.seed).transpose(1, 2, 0))
