"""Many pictures enlarged one after the other: survey and run."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, Literal

from engine.causes import NO_ROOM, is_out_of_threads, system_error
from engine.cli.failures import PicturesFailed, outcome
from engine.cli.file_pairs import Pair
from engine.cli.progress import Meter, log, meter, part_of_meter, warn
from engine.cli.render import Options, in_chain, open_sink, resume_words, say_stopping
from engine.cli.working import Output, render_store, request_digest, write_picture
from engine.errors import (
    BudgetError,
    EngineError,
    InputError,
    Interrupted,
    RenderError,
    ResumeError,
    UsageError,
    counted,
    option,
)
from engine.exporters import check_pixels, check_target
from engine.interrupt import Flag, deferred_interrupt
from engine.io.files import sha256
from engine.io.objects import lies_there
from engine.io.original import size_and_pixels
from engine.job import Job
from engine.model.build import chain
from engine.pixels import PLAIN, PixelFormat
from engine.plan.canvas import Canvas, canvas_of_picture, repetitions
from engine.plan.request import Request

_MACHINE = NO_ROOM | {errno.EMFILE, errno.ENFILE}
"""Errors of the system after which no other picture would fare better."""

_PICTURE_SECONDS = 0.1
"""Time that a picture takes beside its networks: 35 tiny ones took 4 s on one core to plan, to store and to write."""

_OF_ALL = (UsageError, BudgetError)
"""Errors that may have the same cause for all pictures: the options."""

State = Literal["waiting", "written", "done before", "failed"]


@dataclass(slots=True)
class Item:
    """A picture of a batch."""

    pair: Pair
    request: Request
    state: State = "waiting"
    scales: tuple[int, ...] = ()
    """Enlargement of every network that runs."""
    native: tuple[int, int] = (0, 0)
    """(height, width) of the picture, from its header."""
    pixels: PixelFormat = PLAIN
    """Channels and depth of the result, from the header of the picture."""
    canvas: Canvas | None = None
    """Sizes of its enlargements; None where its header cannot be read."""
    share: float = 0.0
    """Expected share of the work of all pictures."""
    seconds: float = 0.0
    """Time that it took."""
    message: str = ""
    """Problem of a picture that failed."""

    @property
    def output(self) -> Output:
        """Place of the result."""
        return self.pair.output

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the result."""
        return None if self.canvas is None else self.canvas.size

    def fail(self, error: Exception) -> None:
        """Note a failure, and say it at once."""
        source, (text, _) = str(self.pair.source), outcome(error, ["upscale"])
        self.state, self.message = "failed", text.removeprefix(f"{source}: ")
        warn(text if text.startswith(source) else f"{source}: {text}")

    def work(self, seconds_per_pixel: Sequence[float]) -> float:
        """Expected seconds of a picture; the last network's cost counts for further ones."""
        if self.canvas is None:
            return 0.0
        height, width = self.canvas.base
        sides: Iterator[int] = accumulate((1, *self.scales[:-1]), mul)
        costs = [*seconds_per_pixel, *[seconds_per_pixel[-1]] * len(self.scales)]
        networks = sum(height * width * side * side * cost for side, cost in zip(sides, costs, strict=False))
        return networks + _PICTURE_SECONDS

    def to_json(self) -> dict[str, Any]:
        """The outcome for reports."""
        height, width = self.size or (None, None)
        return {
            "picture": str(self.pair.source),
            "path": str(self.output.path),
            "width": width,
            "height": height,
            "state": self.state,
            "seconds": round(self.seconds, 2),
            "error": self.message or None,
        }


class Batch:
    """Pictures that are enlarged one after the other.

    Args:
        models: models whose enlargements run one after the other.
        items: the pictures.
        options: options of the command.

    Attributes:
        models, items: as given.
        largest: the largest picture that can be enlarged, after ``survey``; None if nothing waits.
        sample: its plan, which stands for all.
    """

    def __init__(self, models: Sequence[Path], items: Sequence[Item], options: Options) -> None:
        self.models = models
        self.items = items
        self.sample: Job | None = None
        self.largest: Item | None = None
        self._model = chain(models)
        self._options = options
        self._reference: Job | None = None
        self._said: set[str] = set()
        for item in items:
            item.request = in_chain(item.request, self._model, models)

    def survey(self) -> None:
        """Read all headers, find what is done, and plan the largest picture: nothing large is decoded or written.

        Raises:
            InputError: a result exists that may be neither continued nor replaced.
            UsageError: no picture can be enlarged with these options.
            BudgetError: no picture fits the memory or the disk.
        """
        self._check_existing()
        for item in self.items:
            with self._failing(item):
                self._measure(item)
                self._check_output(item)
        if not (waiting := self.in_state("waiting")):
            return
        self._choose_precision()
        self._plan_largest(_from_the_largest(waiting))
        if self.sample is None:
            return
        costs = self.sample.seconds_per_pixel
        total = self.seconds or 1.0
        for item in waiting:
            # Half of the free memory is another amount for every picture: the first amount holds for all.
            item.request = replace(item.request, memory=self.sample.measured.budget.host)
            item.share = item.work(costs) / total

    @property
    def seconds(self) -> float:
        """Expected seconds of the pictures that wait."""
        if self.sample is None:
            return 0.0
        return sum(item.work(self.sample.seconds_per_pixel) for item in self.in_state("waiting"))

    def run(self) -> None:
        """Enlarge what waits.

        Raises:
            PicturesFailed: pictures failed; the others are written.
            Interrupted: stopped on request; ``--resume`` continues.
            EngineError, OSError: the machine has no room for more.
        """
        if not (waiting := self.in_state("waiting")):
            self._check_failed()
            return
        try:
            bar = meter("upscaling", 1.0, forecast=self.seconds)
            with bar as running, deferred_interrupt(say_stopping) as stop:
                for item in waiting:
                    if stop.is_set():
                        raise KeyboardInterrupt
                    self._run_one(item, running, stop)
        except (KeyboardInterrupt, Interrupted) as error:
            done = len(self.in_state("written", "done before"))
            raise Interrupted(
                f"stopped, {done} of {counted(len(self.items), 'picture')} done; the same command with "
                f"{option('resume', True)} goes on"
            ) from error
        self._check_failed()

    def _check_failed(self) -> None:
        """Raise PicturesFailed if a picture failed."""
        if failed := len(self.in_state("failed")):
            others = ", and the others are done" if failed < len(self.items) else ""
            raise PicturesFailed(
                f"{failed} of {counted(len(self.items), 'picture')} failed{others}; {option('resume', True)} tries these again"
            )

    def in_state(self, *states: State) -> list[Item]:
        """Pictures in these states, in order."""
        return [item for item in self.items if item.state in states]

    @contextmanager
    def _failing(self, item: Item, but: tuple[type[EngineError], ...] = ()) -> Iterator[None]:
        """Let a picture fail alone, unless the machine has no room for any other either; ``but``: errors of the command."""
        try:
            yield
        except Exception as error:
            system = system_error(error)
            is_machine = is_out_of_threads(error) or (system is not None and system.errno in _MACHINE)
            if is_machine or isinstance(error, (Interrupted, *but)):
                raise
            item.fail(error)

    def _choose_precision(self) -> None:
        """Let the largest picture of all decide on half precision: a choice by what is left would change on a resume."""
        for item in _from_the_largest(self.in_state("waiting", "done before")):
            try:
                self._reference = self._prepare(item)
                self._reference.picture = None  # what is decoded of it is not kept
                return
            except _OF_ALL:
                return  # to be said by the plan
            except (EngineError, OSError):
                continue

    def _plan_largest(self, items: Sequence[Item]) -> None:
        """Plan the first of these pictures, from the largest down, that can be enlarged.

        Raises UsageError, or BudgetError where not even the smallest fits.
        """
        for item in items:
            if item.state != "waiting":
                continue
            try:
                with self._failing(item, but=_OF_ALL):
                    job = self._prepare(item)
                    job.check()
                    job.picture = None
                    self.sample, self.largest = job, item
                    return
            except BudgetError as error:
                if item is items[0]:
                    self._check_smallest(items)
                item.fail(error)

    def _check_smallest(self, items: Sequence[Item]) -> None:
        """Raise BudgetError where the smallest picture that can be read does not fit: then none does."""
        for item in reversed(items):
            with self._failing(item, but=_OF_ALL):
                self._prepare(item).check()
                return

    def _check_existing(self) -> None:
        """Refuse to touch results that exist. Raises InputError."""
        options = self._options
        if options.resume or options.overwrite or options.dry_run:
            return
        existing = [i.output for i in self.items if lies_there(i.output.path) or lies_there(i.output.store)]
        if existing:
            raise InputError(
                f"{existing[0].path}: {len(existing)} of {len(self.items)} results exist or are begun; give "
                f"{option('resume', True)} to keep what is done, or {option('overwrite', True)} to replace them"
            )

    def _measure(self, item: Item) -> None:
        """Read the header of a picture. Raises InputError, or UsageError for a size that stretches it."""
        request = item.request
        item.native, item.pixels = size_and_pixels(item.pair.source, request.depth, request.profile)
        shape, scales = request.shape_for(item.native), tuple(stage.scale for stage in self._model.stages)
        if self._model.base_generator is None and len(scales) == 1:
            scales *= repetitions(item.native, shape, scales[0], request.stages)
        canvas = canvas_of_picture(shape, item.native, scales, request.stages)
        if item.output.is_picture:
            height, width = canvas.size
            check_target(item.output.picture, size=(height, width), overwrite=True)
            check_pixels(item.output.picture, self._options.picture.given, item.pixels)
        item.canvas, item.scales = canvas, scales[: canvas.stages]

    def _check_output(self, item: Item) -> None:
        """Find out whether a picture is done. Raises InputError for a result that is in the way."""
        options, output = self._options, item.output
        if options.dry_run and not options.resume:
            return
        is_there = options.resume and lies_there(output.path)
        if is_there and output.is_result_of(self._digest(item, sha256(item.pair.source))):
            item.state = "done before"
            output.forget_working_store()
        elif is_there and output.is_picture and not (options.overwrite or output.store.exists()):
            raise ResumeError(
                f"{output.path}: exists, and is no result of these pictures and options; give {option('overwrite', True)} "
                "to replace it"
            )
        else:
            output.check(resume=options.resume, overwrite=options.overwrite)

    def _digest(self, item: Item, picture: str) -> str:
        return request_digest(self._model, item.request, self._options.picture, picture)

    def _prepare(self, item: Item) -> Job:
        job = Job.prepare(self._model, item.request, item.output.store, self._log, like=self._reference)
        if item.output.is_picture:
            for note in check_pixels(item.output.picture, self._options.picture.given, job.plan.pixels):
                self._log(f"{item.output.path}: {note}")
        return job

    def _log(self, line: str) -> None:
        """Print a note once: the largest picture is planned twice."""
        if line not in self._said:
            self._said.add(line)
            log(line)

    def _run_one(self, item: Item, bar: Meter, stop: Flag) -> None:
        """Enlarge a picture; its share of the work counts as done, however it ends."""
        start = time.perf_counter()
        move = part_of_meter(bar, item.share)
        with self._failing(item):
            self._enlarge(item, move, stop)
            item.state = "written"
        move(1.0, item.pair.source.name)
        item.seconds = time.perf_counter() - start

    def _enlarge(self, item: Item, move: Callable[[float, str], None], stop: Flag) -> None:
        job, output, name = self._prepare(item), item.output, item.pair.source.name
        assert job.picture is not None
        options = replace(self._options, resume=self._options.resume and output.store.exists())
        words = resume_words(self.models, item.request, options)
        sink = open_sink(job, output, options, words, self._digest(item, job.picture.digest))
        try:
            render_store(job, sink, lambda progress: move(progress.share, name), stop.is_set)
            if output.is_picture:
                move(1.0, f"writing {output.path.name}")
                write_picture(sink, output, options.picture, lambda done, total: None)
                output.put_away(sink)
        except (InputError, RenderError) as error:
            if output.is_picture and not isinstance(error, ResumeError):
                output.forget_working_store()  # of a damaged picture, which nothing can finish
            raise


def _from_the_largest(items: Sequence[Item]) -> list[Item]:
    """Pictures by their work, the most first."""
    return sorted(items, key=lambda item: -item.work((1.0,)))
