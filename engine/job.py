"""The main job: from a model and a request to a store full of pixels."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from math import prod
from operator import mul
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from engine.device.choose import choose_device, is_precision
from engine.device.heap import fix_malloc_thresholds
from engine.device.memory import PeakMemory, device_limit, process_peak
from engine.device.rounding import backend_differences, backend_facts
from engine.device.runtime import untested
from engine.errors import BudgetError, InputError, Interrupted, ResumeError, UsageError, counted, option
from engine.exporters import names_export
from engine.geometry import Box
from engine.io.about_picture import about_picture
from engine.io.files import replacing, temporary_name
from engine.io.first_look import FIRST_LOOK, MAX_SIDE, encode_first_look
from engine.io.objects import ObjectPath, Place, anchor_of, as_place, lies_there, local_copy
from engine.io.original import OriginalPicture
from engine.io.part_sink import PartSink
from engine.io.photo import Source
from engine.io.zarr_store import PARTS, Array, ArraySink, ZarrSink, statistics_name, stored_plan, stored_scratch
from engine.measure import base_source, complete, measure
from engine.model.bundle import DEFAULT, Model, load
from engine.plan.canvas import repetitions
from engine.plan.cost import Projection, check, readable
from engine.plan.halo import largest
from engine.plan.layouts import candidates
from engine.plan.limits import HALVES_BYTES
from engine.plan.make import StoredCut, make_plan, project, seam_errors, stored_cut
from engine.plan.measured import Measured, MissingMeasurement
from engine.plan.parts import Part, Shares, parse_part
from engine.plan.plan import Plan, StagePlan, sides_of, stored_sides
from engine.plan.request import AUTO, Request
from engine.plan.strips import narrower
from engine.run.bands import RowsOfShards
from engine.run.pipeline import BoxWritten, Pipeline, run_function
from engine.run.reduce import canvas_image
from engine.run.stage import Stage, StageFactory
from engine.run.statistics import Statistics
from engine.run.tiles import OnPixels
from engine.version import __version__

Log = Callable[[str], None]
AnySink = TypeVar("AnySink", bound=ZarrSink)


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a render after a network has run."""

    done: int
    """LR pixels that the networks have computed."""
    total: int
    """LR pixels of this run; a resumed run computes the missing ones."""
    step: int
    """Super-resolution step that has just run: 2 to 4."""
    share: float
    """Share of the expected time of this run, 0 to 1: steps differ in cost per pixel, and step 1 comes before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Measured cost of a render."""

    seconds: float
    """Time from the first box to the last."""
    compute_seconds: float
    """Part of it in networks."""
    write_seconds: float
    """Time to compress and write, part of it while networks ran."""
    writes: int
    """Boxes that were written."""
    host_peak: int
    """Peak of the process's resident bytes since its start."""
    working_peak: int
    """Peak of the render above the idle process with the model loaded."""
    device_peak: int
    """Peak of the accelerator's memory in bytes; 0 without one."""
    tiles_redone_in_fp32: int
    """Tiles, or rows of shards of a strip, that half precision could not represent."""
    cores: tuple[int | list[int], ...]
    """Tile of every stage as it really ran, in LR pixels: a side, or [rows, columns]."""
    seam_error_levels: float | None
    """Largest seam error in levels of 255; 0.0 if exact, None if not measured."""


@dataclass(frozen=True, slots=True)
class RenderResult:
    """A finished render."""

    path: Place
    """Folder or URL of the store."""
    plan: Plan
    """Fields that decided its pixels."""
    projection: Projection
    """Expected cost."""
    measurements: Measurements
    """Measured cost."""


@dataclass(kw_only=True)
class Job:
    """A planned render, made by ``prepare``. Look at ``plan`` and ``projection``, then ``check`` and ``render``."""

    model: Model
    request: Request
    out: Place
    factory: StageFactory
    picture: OriginalPicture | None
    measured: Measured
    log: Log
    plan: Plan = field(init=False)
    """Fields that decide the output's pixels."""
    projection: Projection = field(init=False)
    """Expected cost."""
    cuts: tuple[StagePlan, ...] = field(init=False)
    """Stages as they are really cut, which differs from the plan where a device's memory was exhausted."""
    redone: int = field(default=0, init=False)
    """Tiles, or rows of shards of a strip, that half precision could not represent and float32 computed again."""
    _scratch: Path = field(init=False)
    """Folder for tiles that exceed the caches."""
    _resized: OriginalPicture | None = field(default=None, init=False)
    """The picture at the size of the base image, where that differs."""
    _is_part: bool = field(default=False, init=False)
    """Whether other processes render the rest: then the cut stays theirs, and tiles of inner stages are shared."""

    def __post_init__(self) -> None:
        self._scratch = temporary_name(anchor_of(self.out), "scratch")

    @classmethod
    def prepare(
        cls,
        model: Model | Path | str | None,
        request: Request | None = None,
        out: Place | str = "out.zarr",
        log: Log | None = None,
        *,
        like: Job | None = None,
    ) -> Job:
        """Measure what the plan needs and make it; nothing is rendered and nothing is written.

        Args:
            model, out, log: as for ``engine.render``.
            request: options of the render; by default those of an empty ``Request``.
            like: job of another picture with the same options: its networks and its choice of precision are used again,
                where the picture takes the same enlargements.

        Raises:
            UsageError: the request contradicts itself or the model.
            BudgetError: no executor fits the budget.
            InputError: the picture or the output's folder cannot be used.
        """
        request, out, log = request or Request(), as_place(out), log or _ignore
        if not out.name or out.name == "..":
            raise UsageError(f"{option('out', out)}: names no store; give it a name, for instance {out / 'out.zarr'}")
        if names_export(out):
            store = out.with_name(f"{out.stem}.zarr")
            raise UsageError(
                f"{option('out', out)}: names an export, and a render writes a store; call "
                f"engine.render(..., {str(store)!r}), then engine.export({str(store)!r}, {str(out)!r})"
            )
        fix_malloc_thresholds()
        model, picture = opened(model, request)
        if like is not None and like.model.digest != model.digest:
            like = None
        factory = StageFactory(model, choose_device(request.device)) if like is None else like.factory
        if like is None:
            if (note := untested(factory.device)) is not None:
                log(note)
            if request.executor not in (AUTO, *candidates(request, factory.device.type)):
                log(f"no GPU here: executor {request.executor} runs as tiles on the CPU")
        for note in picture.notes if picture is not None else ():
            log(f"{as_place(request.init or '')}: {note}")
        job = cls(
            model=model,
            request=request,
            out=out,
            factory=factory,
            picture=picture,
            measured=measure(
                model, request, factory, out=out, picture=picture, log=log, like=None if like is None else like.measured
            ),
            log=log,
        )
        job._make_plan()
        return job

    @property
    def device(self) -> torch.device:
        """Device that computes."""
        return self.factory.device

    @property
    def stages(self) -> list[Stage]:
        """Network of every stage."""
        return self.factory.stages(self.measured.precisions)

    @property
    def seam_error(self) -> float | None:
        """Largest seam error of any stage, as cut, in levels of 255; None when it was not measured."""
        return largest(seam_errors(replace(self.plan, stages=self.cuts), self.measured))

    def check(self) -> None:
        """Raise BudgetError when the plan does not fit the budgets."""
        check(self.plan, self.projection, self.measured.budget)

    def check_room(self, count: int) -> None:
        """Raise BudgetError unless the disk has room for ``count`` stores such as this one."""
        stored = self.projection.disk if self.measured.budget.holds_store else 0
        needed = count * stored + self.projection.scratch
        if needed > self.measured.budget.disk:
            raise BudgetError(
                f"{counted(count, 'sample')} may take {readable(needed)}, the disk of {anchor_of(self.out).parent} has "
                f"{readable(self.measured.budget.disk)} free; use fewer {option('samples')}, a smaller {option('size')}, or "
                f"{option('keep')} on another disk"
            )

    def open_sink(
        self,
        *,
        resume: bool = False,
        overwrite: bool = False,
        accept_backend: bool = False,
        notes: Mapping[str, Any] = MappingProxyType({}),
    ) -> ZarrSink:
        """Make the store, or with ``resume`` open the store to be finished and adopt its cut.

        Args:
            resume: finish an interrupted store, if there is one.
            overwrite: replace an existing store.
            accept_backend: finish a store that was begun with other instructions or another number of threads, whose pixels
                are rounded in another way.
            notes: values that a new store records beside its provenance.

        Raises:
            BudgetError: the plan does not fit the budgets.
            ResumeError: the store exists, or was made with another plan, or where pixels are rounded in another way.
        """
        stored = stored_plan(self.out) if resume else None
        if stored is None and not (resume and lies_there(self.out)):
            self.check()
            sink = ZarrSink.create(self.out, self.plan, {**self._provenance(), **notes}, overwrite=overwrite)
            return self._begin(sink)
        self._adopt(stored or {})
        return self._continue(ZarrSink.resume(self.out, self.plan), accept_backend=accept_backend)

    def open_part(
        self,
        part: Part | str,
        *,
        accept_backend: bool = False,
        notes: Mapping[str, Any] = MappingProxyType({}),
        again: bool = False,
    ) -> PartSink:
        """Open the store to write one part of it. The first part makes the store, and the others adopt its cut.

        Args:
            part: the part, such as ``"2/4"``.
            accept_backend, notes: as for ``open_sink``.
            again: as for ``PartSink.join``.

        Raises:
            BudgetError: the plan, or that of the first part, does not fit the budgets.
            ResumeError: as ``open_sink``; the store has other parts or none, or another process renders this part.
        """
        part, self._is_part = parse_part(part), True
        if not lies_there(self.out):
            shares = Shares.of(self.plan, self.measured, part.count)
            self.show_part(part, shares)
            self.check()
            provenance = {**self._provenance(), **notes, PARTS: shares.to_json()}
            try:
                sink = ZarrSink.create(self.out, self.plan, provenance, shared=True)
                self._keep_statistics()  # the other parts take them
                sink.close()
            except ResumeError:  # another part was faster
                if not lies_there(self.out):
                    raise
        self._adopt(stored_plan(self.out) or {})
        return self._continue(PartSink.join(self.out, self.plan, part, again=again), accept_backend=accept_backend)

    def show_part(self, part: Part, shares: Shares | None = None) -> Shares:
        """Reduce the projection to one part; returns how the plan is divided."""
        shares = shares or Shares.of(self.plan, self.measured, part.count)
        self.projection = project(self.plan, self.measured, shares.writes(self.plan, part).rectangles)
        return shares

    def _adopt(self, stored: dict[str, Any]) -> None:
        """Plan again with the precision, cut and statistics of a stored plan, as far as the request allows."""
        self._adopt_precision(stored)
        cut = stored_cut(stored, self.request, self.measured)
        if self._adopt_statistics(stored) or cut is not None:
            self._make_plan(cut)

    def _continue(self, sink: AnySink, *, accept_backend: bool) -> AnySink:
        """Adopt the state of a store that an earlier run left. Raises as ``open_sink``."""
        try:
            if not (sink.is_finished or accept_backend):
                self._check_backend(sink)
            self._scratch = sink.scratch
            self.cuts = self._stored_cuts(sink)
            self.projection = project(self.plan, self.measured, sink.missing())
            budget = self.measured.budget
            written = _size(self._scratch) + (
                _size(self.out) if isinstance(self.out, Path) else 0
            )  # these bytes need not be free once more
            self.measured = replace(self.measured, budget=replace(budget, disk=budget.disk + written))
            self.check()
        except BaseException:
            sink.close()
            raise
        return self._begin(sink)

    def run(
        self, sink: ZarrSink, on_pixels: OnPixels = lambda position, lr_pixels: None
    ) -> Generator[BoxWritten, None, None]:
        """Compute and write every missing box; yields after each write.

        Args:
            sink: store, as ``open_sink`` gives it.
            on_pixels: called with (position of the stage, LR pixels) after a network has run.
        """
        if self.device.type != "cpu":
            sink.keep_halves(HALVES_BYTES)
        with closing(sink), device_limit(self.device, self.request.vram):
            if not sink.is_finished:
                pipeline = self._pipeline(lambda cuts: self._note_recut(sink, cuts), on_pixels)
                self._note_first_look(sink, pipeline.base)
                try:
                    yield from run_function(self.plan)(pipeline, sink)
                finally:
                    self.redone += pipeline.redone
            sink.finish()

    def reader(self, sink: ZarrSink) -> Callable[[Box], Array]:
        """Function that computes any whole shard of a strip or of the image, [C, h, w], with the bits of ``run``.

        Args:
            sink: store, as ``open_sink`` gives it; it gets the first look.
        """
        pipeline, roi = self._pipeline(lambda cuts: None), self.plan.roi
        self._note_first_look(sink, pipeline.base)
        if self.plan.is_banded:
            rows = RowsOfShards(pipeline)
            return lambda box: rows.read(box, roi.height).pixels.numpy()
        image = canvas_image(self.plan, pipeline.tiles()[-1], pipeline.finish)
        return lambda box: image.read(box.shift(roi.y0, roi.x0)).numpy()

    def render(
        self,
        sink: ZarrSink | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> RenderResult:
        """Run to the end and measure.

        Args:
            sink: store, as ``open_sink`` gives it; by default a new one.
            on_progress, cancelled: as for ``engine.render``.

        Raises:
            Interrupted: ``cancelled`` returned True.
        """
        sink, report = sink or self.open_sink(), on_progress or _ignore
        total, done = sum(self.projection.lr_pixels), [0] * len(self.plan.stages)
        expected, costs = max(self.projection.seconds, 1e-9), self.seconds_per_pixel
        before = expected - sum(map(mul, self.projection.lr_pixels, costs))  # seconds of step 1

        def advance(position: int, lr_pixels: int) -> None:
            # The projection of bands is right to a few rows.
            done[position] = min(done[position] + lr_pixels, self.projection.lr_pixels[position])
            share = min(1.0, (before + sum(map(mul, done, costs))) / expected)
            report(Progress(sum(done), total, self.plan.stages[position].step, share))

        writes, compute, write = 0, 0.0, 0.0
        start = time.perf_counter()
        with PeakMemory(self.device) as peak, closing(self.run(sink, advance)) as boxes:
            for written in boxes:
                writes += 1
                compute += written.compute_seconds
                write += written.write_seconds
                if cancelled is not None and cancelled() and not sink.is_finished:
                    raise Interrupted(
                        f"{self.out}: stopped after a whole shard; the same command with {option('resume', True)} goes on"
                    )
        if total:
            report(Progress(total, total, self.plan.stages[-1].step, 1.0))
        measurements = Measurements(
            seconds=time.perf_counter() - start,
            compute_seconds=compute,
            write_seconds=write,
            writes=writes,
            host_peak=process_peak(),
            working_peak=max(0, peak.host - self.measured.baseline),
            device_peak=peak.device,
            tiles_redone_in_fp32=self.redone,
            cores=tuple(stored_sides(cut.core) for cut in self.cuts),
            seam_error_levels=self.seam_error,
        )
        return RenderResult(self.out, self.plan, self.projection, measurements)

    def pixels(self, seed: int) -> Array:
        """The whole planned image with another seed, which the plan then has: [C, h, w], for small images."""
        self.plan = replace(self.plan, seed=seed)
        sink = ArraySink(self.plan)
        with device_limit(self.device, self.request.vram):
            for _ in run_function(self.plan)(self._pipeline(lambda cuts: None), sink):
                pass
        shutil.rmtree(self._scratch, ignore_errors=True)
        return sink.pixels

    def base_image(self, seed: int) -> Array:
        """The image that step 1 makes of a seed, where it is written: uint8 [h, w, 3]."""
        assert self.picture is None
        pixels = self._base_pixels(base_source(self.model, None, self.plan.base, seed, self.request.wraps))
        assert pixels is not None
        return pixels

    @property
    def seconds_per_pixel(self) -> tuple[float, ...]:
        """Expected seconds of every stage for an LR pixel."""
        costs = [stage.bands if self.plan.is_banded else stage.footprint for stage in self.measured.stages]
        return tuple(cost.seconds_per_pixel for cost in costs if cost is not None)

    def _begin(self, sink: AnySink) -> AnySink:
        """Say what the store's user may not know of it."""
        self._scratch = sink.scratch
        if not sink.complete:
            self._keep_statistics()
        if sink.lost:
            self.log(f"{self.out}: {counted(sink.lost, 'shard')} missing or damaged; rendered again")
        if sink.replaced is not None:
            self.log(f"{self.out}: the old store is kept as {sink.replaced.name} until this one is complete")
        return sink

    def _make_plan(self, cut: StoredCut | None = None) -> None:
        """Make the plan and its projection, after further measurements if they need any."""
        while True:
            try:
                self.plan = make_plan(self.request, self.measured, cut)
                self.projection = project(self.plan, self.measured)
            except MissingMeasurement as missing:
                self.measured = complete(
                    self.measured, missing, self.model, self.request, self.factory, picture=self.picture, log=self.log
                )
            else:
                self.cuts = self.plan.stages
                return

    def _adopt_precision(self, stored: dict[str, Any]) -> None:
        """Continue an automatic precision as the store has it: the choice depends on measured times."""
        precision = stored.get("precision")
        if (
            self.request.precision != AUTO
            or precision == self.plan.precision
            or not is_precision(precision, len(self.cuts))
        ):
            return
        self.request = replace(self.request, precision=str(precision))
        self.measured = measure(
            self.model, self.request, self.factory, out=self.out, picture=self.picture, log=self.log
        )
        self._make_plan()

    def _adopt_statistics(self, stored: dict[str, Any]) -> bool:
        """Continue with the statistics that the store was begun with: another machine records others, by rounding.

        Returns whether they are others.
        """
        folder = stored_scratch(self.out)
        stages = list(self.measured.stages)
        with suppress(KeyError, TypeError, AttributeError):
            for index, stage in enumerate(stored["stages"]):
                digest = str(stage.get("statistics", ""))
                if digest and digest not in self.factory.statistics:
                    self._fetch_statistics(digest)
                    kept = Statistics(self.stages[index].sites, (0, 0), {}).load(folder / statistics_name(digest))
                    if kept is None or self.factory.keep(kept) != digest:
                        continue  # the difference of the plans is reported
                if digest:
                    stages[index] = replace(stages[index], statistics=digest)
        changed = tuple(stages) != self.measured.stages
        self.measured = replace(self.measured, stages=tuple(stages))
        return changed

    def _keep_statistics(self) -> None:
        """Write the statistics of the plan beside the store, for a resumed render and for other parts."""
        folder = stored_scratch(self.out)
        for cut in self.plan.stages:
            file = folder / statistics_name(cut.statistics)
            if cut.statistics and not file.exists():
                self.factory.statistics[cut.statistics].save(file)
            if cut.statistics and isinstance(self.out, ObjectPath):
                (self.out / file.name).write_new(file.read_bytes())

    def _fetch_statistics(self, digest: str) -> None:
        """Copy statistics that another machine wrote beside the store."""
        file = stored_scratch(self.out) / statistics_name(digest)
        if isinstance(self.out, ObjectPath) and not file.exists() and (stored := self.out / file.name).is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as part:
                part.write_bytes(stored.read_bytes())

    def _pipeline(
        self, on_recut: Callable[[tuple[StagePlan, ...]], None], on_pixels: OnPixels = lambda position, lr_pixels: None
    ) -> Pipeline:
        return Pipeline(
            plan=self.plan,
            cuts=self.cuts,
            stages=[
                self.factory.frozen(stage, cut.statistics)
                for stage, cut in zip(self.stages, self.plan.stages, strict=True)
            ],
            base=self._base(),
            alpha=self._alpha(),
            scratch=self._scratch,
            batches=self.projection.batches,
            may_recut=self.request.tile is None and not self._is_part,
            shares_tiles=self._is_part,
            on_pixels=on_pixels,
            on_recut=on_recut,
        )

    def _check_backend(self, sink: ZarrSink) -> None:
        """Refuse to continue where pixels are rounded in another way. Raises ResumeError."""
        if differences := backend_differences(sink.provenance, self.device):
            raise ResumeError(
                f"{self.out}: begun on another machine or with other threads ({'; '.join(differences)}), which {_ROUNDING}; "
                f"render it as it was begun, or give {option('accept_backend', True)} to go on"
            )

    def _stored_cuts(self, sink: ZarrSink) -> tuple[StagePlan, ...]:
        """The stages as an earlier run ended with them. Raises ResumeError when their tiles are damaged."""
        stages = self.plan.stages
        tiles = sink.provenance.get("cores")
        if tiles is None:
            return stages
        if self.plan.is_banded:
            cuts: tuple[StagePlan, ...] | None = stages
            while cuts is not None and [stored_sides(cut.core) for cut in cuts] != tiles:
                cuts = narrower(self.plan, cuts)
            if cuts is not None:
                return cuts
        else:
            with suppress(TypeError, ValueError):
                return tuple(_with_smaller_tile(stage, tile) for stage, tile in zip(stages, tiles, strict=True))
        raise ResumeError(
            f"{self.out}: damaged, its tiles do not fit its plan ({tiles}); use {option('overwrite', True)}"
        )

    def _note_recut(self, sink: ZarrSink, cuts: tuple[StagePlan, ...]) -> None:
        """Record that a stage ran out of device memory, and that the render continues with smaller tiles or strips."""
        smaller = next(new for old, new in zip(self.cuts, cuts, strict=True) if new != old)
        self.cuts = cuts
        sink.note({"cores": [stored_sides(cut.core) for cut in cuts], "seam_error_levels": self.seam_error})
        if self.plan.is_banded:
            smaller = cuts[-1]
        parts = "strips" if self.plan.is_banded else "tiles"
        self.log(f"{smaller.name}: out of device memory; going on with {parts} of {smaller.core_text} px")

    def _sized_picture(self) -> OriginalPicture | None:
        """The picture at the size of the base image."""
        if self.picture is None or self.picture.size == self.plan.base:
            return self.picture
        if self._resized is None:
            self._resized = self.picture.resampled(self.plan.base)
        return self._resized

    def _alpha(self) -> Source | None:
        picture = self._sized_picture()
        return picture.alpha if picture is not None else None

    def _base(self) -> Source:
        return base_source(self.model, self._sized_picture(), self.plan.base, self.plan.seed, self.request.wraps)

    def _gives_first_look(self, sink: ZarrSink) -> bool:
        """Whether this run adds the first look: of several parts, the first one alone changes the metadata."""
        is_other_part = isinstance(sink, PartSink) and sink.part.number != 1
        return not is_other_part and FIRST_LOOK not in sink.provenance

    def _note_first_look(self, sink: ZarrSink, base: Source) -> None:
        if self._gives_first_look(sink) and (look := self._first_look(base)) is not None:
            sink.note({FIRST_LOOK: look})

    def _first_look(self, base: Source) -> str | None:
        """The base image of what is written, as the store records it; None for a picture that is costly or damaged."""
        pixels = self._base_pixels(base)
        return None if pixels is None else encode_first_look(pixels)

    def _base_pixels(self, base: Source) -> Array | None:
        """The base image of what is written, uint8 [h, w, 3]; None for a picture that is costly or damaged."""
        height, width = base.size
        shrink = 1
        if self.picture is None:
            pixels = (base.read(Box(0, 0, height, width)).permute(1, 2, 0) * 255).round().byte().numpy()
        else:
            shrink = -(-max(height, width) // MAX_SIDE)
            try:
                if not self.picture.is_light or max(height, width) > _LOOKED_AT:
                    return None
                pixels = self.picture.thumbnail((-(-height // shrink), -(-width // shrink)))
            except InputError:  # which the render meets where it reads
                return None
        scale = shrink * prod(stage.scale for stage in self.plan.stages)
        box = replace(self.plan.reduction, margin=(0, 0)).read(self.plan.roi).cover(scale)
        # The base image has no margin along axes that wrap.
        box = box.shift(*(0 if period else self.plan.margin for period in self.plan.stages[0].period))
        rows, columns = box.clip(Box(0, 0, *pixels.shape[:2])).slices
        part: Array = pixels[rows, columns]
        return part

    def _provenance(self) -> dict[str, Any]:
        """Facts about the store that decide no pixel."""
        error = self.measured.precision_error
        picture = {}
        if self.picture is not None:
            picture = about_picture(self.picture.profile, self.picture.dpi)
        profiles = [stage.profile for stage in self.measured.stages]
        whole = [asdict(s.whole_error) if s.whole_error else None for s in self.measured.stages]
        return {
            "engine": __version__,
            **backend_facts(self.device),
            "model": self.model.path.name,
            "licences": self.model.manifest.licences,
            "overlap": self.request.overlap,
            "seam_error_levels": self.seam_error,
            "precision_error_levels": asdict(error) if error else None,
            **({"whole_error_levels": whole} if any(whole) else {}),
            "profiles": [p.to_json() if p else None for p in profiles],
            **picture,
        }


def opened(model: Model | Path | str | None, request: Request) -> tuple[Model, OriginalPicture | None]:
    """The model of a render, with a lone network repeated as often as the size takes, and the picture to start from.

    Raises ModelError or InputError when one of them cannot be opened, and UsageError for a profile without a picture.
    """
    if not isinstance(model, Model):
        model = load(model or (DEFAULT if request.init is None else "realsr"))
    if request.profile is not None and request.init is None:
        raise UsageError(
            f"{option('profile', request.profile)}: converts a picture to enlarge ({option('init')}); a model renders sRGB"
        )
    picture = None
    if request.init is not None:
        picture = OriginalPicture(
            local_copy(request.init), depth=request.depth, profile=request.profile, wraps=request.wraps
        )
    if picture is not None and model.base_generator is None and len(model.stages) == 1:
        shape = request.shape_for(picture.size)
        times = repetitions(picture.size, shape, model.stages[0].scale, request.stages)
        model = model.repeated(times) if times > 1 else model
    return model, picture


_LOOKED_AT = 1 << 14
"""Longest side of a picture that gives a first look: shrinking one takes up to 2.4 KB for each column of the file."""

_ROUNDING = "changes single pixels by a level in fp32, and by a few levels in half precision"
"""Effect of other instructions or threads (docs/results.md)."""


def _ignore(_: object) -> None:
    """A log without a reader."""


def _with_smaller_tile(stage: StagePlan, stored: object) -> StagePlan:
    """A stage of the plan that continues with a smaller tile, after its device ran out of memory.

    Raises ValueError when it may not.
    """
    rows, columns = core = sides_of(stored)
    if rows > stage.core[0] or columns > stage.core[1] or min(core) < stage.blend or any(n % stage.align for n in core):
        raise ValueError(f"tiles of {rows} x {columns} in place of {stage.core}")
    return stage.with_core(core)


def _size(folder: Path) -> int:
    """Bytes of all files below, some of which other parts may rename meanwhile."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size
