"""Functions that run on a worker. They open the model and the store there, and return numbers alone."""

from __future__ import annotations

import copy
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from distributed import Status, Worker, get_worker

from engine.errors import EngineError, InputError
from engine.geometry import Box
from engine.io.objects import Place, is_url, lies_there
from engine.io.part_sink import PartSink, shares_of
from engine.io.provenance import stored_provenance
from engine.io.store_layout import written_shards
from engine.job import Job
from engine.model.bundle import Model, load
from engine.plan.cost import Projection
from engine.plan.make import project
from engine.plan.measured import Measured
from engine.plan.parts import Part, Shares
from engine.plan.plan import Plan
from engine.plan.request import Request
from engine.result import Measurements, Progress
from engine.version import __version__

DEVICE = "ENGINE_DEVICE"
"""Variable of a worker's environment that names its device, where the request names none."""

_SECONDS_PER_REPORT = 0.5

_TRIED = (1, 2, 4)
"""Shares for each worker that are tried: more of them balance better and repeat more work."""

_MAX_OVERHEAD = 0.05
"""Work beyond one share for each worker that more shares may take, as a share of one run."""

_MIN_SECONDS = 2.0
"""Expected time below which a share is not divided further."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A render, as every worker receives it. Paths are absolute, and mean the same files to all workers."""

    model: Path | str | None
    request: Request
    out: Place
    topic: str
    """Topic of Dask's events that receives the progress."""
    accept_backend: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    """Values that a new store records beside its provenance."""
    version: str = __version__


def order_of(
    model: Path | str | None,
    request: Request,
    out: Place,
    topic: str,
    *,
    accept_backend: bool = False,
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> Order:
    """An order whose paths mean the same to workers in other folders."""
    if model is not None and os.path.exists(model):
        model = Path(model).absolute()
    if request.init is not None and not is_url(request.init):
        request = replace(request, init=Path(request.init).absolute())
    return Order(
        model=model,
        request=request,
        out=out.absolute() if isinstance(out, Path) else out,
        topic=topic,
        accept_backend=accept_backend,
        notes=dict(notes),
    )


@dataclass(frozen=True, slots=True)
class Begun:
    """A store that is begun: its plan as the first worker made it, and its shares."""

    plan: Plan
    projection: Projection
    """Cost of one run of all."""
    measured: Measured
    shares: Shares
    seconds: tuple[float, ...]
    """Expected seconds of what every share still misses; 0 for one that is done."""
    picture: tuple[int, int] | None
    """Size of the picture to enlarge."""
    lost: int
    """Shards that were damaged."""


@dataclass(frozen=True, slots=True)
class Done:
    """A share or sample that is written."""

    measurements: Measurements
    cpu_seconds: float
    """CPU time of the worker's process meanwhile."""
    lr_pixels: int
    """LR pixels that the networks computed."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """Result of a task, or the error of its worker: an error that is raised would be tried again, without a reason."""

    worker: str
    """Address of the worker."""
    name: str
    """Name of the worker, for people."""
    result: T | None = None
    error: EngineError | OSError | MemoryError | None = None


class _Task:
    """The task that runs in this thread."""

    def __init__(self, topic: str) -> None:
        self.worker: Worker = get_worker()
        self._key = self.worker.get_current_task()
        self._topic = topic
        self._last = -1e9

    def is_dropped(self) -> bool:
        """Whether nobody waits for the result: it was cancelled, or the worker is cut off from its scheduler.

        A running thread is not stopped by Dask, so the render asks after each write.
        """
        state = self.worker.state.tasks.get(self._key)
        is_open = self.worker.status in (Status.running, Status.paused)
        return not is_open or state is None or state.state not in ("executing", "long-running")

    def tell(self, **values: object) -> None:
        """Send values to the client, as an event of the scheduler."""
        if not self.is_dropped() or "ended" in values:
            self.worker.log_event(self._topic, {"key": str(self._key), "worker": self.worker.address, **values})

    def tell_share(self, progress: Progress) -> None:
        """Send the progress, at most every half second."""
        if (now := time.monotonic()) - self._last >= _SECONDS_PER_REPORT:
            self._last = now
            self.tell(share=progress.share)


_one_at_a_time = threading.Lock()
"""A worker with several threads computes one task at a time: a plan has the memory of a process."""


def _answering(function: Callable[..., T]) -> Callable[..., Answer[T]]:
    """Let a function of (task, order, ...) answer, one call at a time in this process."""

    @functools.wraps(function)
    def answer(order: Order, *arguments: object) -> Answer[T]:
        worker = get_worker()
        who = worker.address, str(worker.name)
        with _one_at_a_time:
            task = _Task(order.topic)
            task.tell(begun=True)
            try:
                if order.version != __version__:
                    raise InputError(
                        f"worker: runs engine {__version__}, not {order.version}; install the same version"
                    )
                return Answer(*who, function(task, _for_worker(order, worker), *arguments))
            except EngineError as error:
                raw = error.args[0] if error.args else ""
                kind = type(error) if type(error).__init__ is EngineError.__init__ else EngineError
                plain = kind(raw)  # one that pickles
                plain.exit_code = error.exit_code
                return Answer(*who, error=plain)
            except (OSError, MemoryError) as error:
                return Answer(*who, error=error)
            finally:
                task.tell(ended=True)

    return answer


def _for_worker(order: Order, worker: Worker) -> Order:
    """The order with the device of the worker, and within its memory: Dask pauses a worker that takes more."""
    request, manager = order.request, worker.memory_manager
    if request.device is None and DEVICE in os.environ:
        request = replace(request, device=os.environ[DEVICE])
    if limit := manager.memory_limit:
        allowed = int(limit * (manager.memory_pause_fraction or 1.0))
        request = replace(request, memory=min(request.memory or allowed, allowed))
    return replace(order, request=request)


_kept: dict[object, Job] = {}
"""The job of the last task, with its model and networks."""

_models: dict[object, Model] = {}
"""The last model."""


def _model_of(order: Order) -> Model | Path | str | None:
    """The model, opened once."""
    if not isinstance(order.model, Path):
        return order.model
    try:
        status = order.model.stat()
        key = (order.model, status.st_mtime_ns, status.st_size)
    except OSError:
        return order.model  # the error of ``load`` says it better
    if key not in _models:
        _models.clear()
        _models[key] = load(order.model)
    return _models[key]


def _job_of(order: Order, task: _Task) -> Job:
    """The planned render, measured once."""
    model = _model_of(order)
    key = (id(model) if isinstance(model, Model) else model, order.request, order.out)
    if key not in _kept:
        _kept.clear()
        _kept[key] = Job.prepare(model, order.request, order.out, lambda line: task.tell(line=line))
    return _kept[key]


def _opened(order: Order, task: _Task, part: Part) -> tuple[Job, PartSink]:
    """A copy of the kept job, which adopts the store's plan, and the store."""
    kept = _job_of(order, task)
    job = copy.copy(kept)
    job.redone = 0
    sink = job.open_part(part, accept_backend=order.accept_backend, notes=order.notes, again=True)
    # The next share need not measure again what this plan needed; the budget of the disk grows by what is written.
    kept.plan, kept.measured = job.plan, replace(job.measured, budget=kept.measured.budget)
    return job, sink


@_answering
def begin(task: _Task, order: Order, workers: int, count: int | None) -> Begun:
    """Make the store, unless it is there, and tell its plan and what its shares miss.

    Args:
        task, order: as for all tasks.
        workers: number of workers.
        count: number of shares; by default few, for the number of workers. A store that is there keeps its own.
    """
    provenance = stored_provenance(order.out) or {}
    job = _job_of(order, task)
    is_begun = lies_there(order.out)
    if is_begun and not provenance.get("complete"):
        # A store that was begun as a whole is refused by open_part, whatever the number.
        shares = shares_of(order.out, Plan.from_json(provenance["plan"]), provenance) if "plan" in provenance else None
        count = shares.count if shares is not None else 1
    count = count or _count(job, workers)
    job, sink = _opened(order, task, Part(1, count))
    lost = sink.lost
    sink.close()
    shares = shares_of(order.out, job.plan, sink.provenance) or Shares.of(job.plan, job.measured, count)
    seconds = tuple(
        _seconds(job, _missing(order.out, job.plan, shares.writes(job.plan, part))) for part in shares.parts
    )
    picture = job.picture.size if job.picture is not None else None
    return Begun(job.plan, project(job.plan, job.measured), job.measured, shares, seconds, picture, lost)


def _count(job: Job, workers: int) -> int:
    """Number of shares: more than one for each worker where that repeats little work."""
    writes = len(job.plan.writes())
    best, least = min(workers, writes), None
    for times in _TRIED:
        count = workers * times
        if count > writes or (times > 1 and job.projection.seconds / count < _MIN_SECONDS):
            break
        overhead = Shares.of(job.plan, job.measured, count).overhead(job.plan, job.measured)
        least = overhead if least is None else least
        if overhead - least <= _MAX_OVERHEAD:
            best = count
    return best


def _missing(out: Place, plan: Plan, writes: Iterable[Box]) -> list[Box]:
    """Boxes with a missing file of a shard."""
    written = written_shards(out, plan)
    return [b for b in writes if not all(written.has(0, index) for index in plan.grid().indices(b))]


def _seconds(job: Job, writes: list[Box]) -> float:
    return max(project(job.plan, job.measured, writes).seconds, 1e-6) if writes else 0.0


@_answering
def render_share(task: _Task, order: Order, part: Part) -> Done:
    """Render a share. The store is begun."""
    job, sink = _opened(order, task, part)
    begin = time.process_time()
    result = job.render(sink, on_progress=task.tell_share, cancelled=task.is_dropped)
    return Done(result.measurements, time.process_time() - begin, sum(job.projection.lr_pixels))


@_answering
def render_sample(task: _Task, order: Order, paths: Sequence[Path]) -> Done:
    """Render a store of its own, one of ``paths``; one that is there is finished."""
    job = Job.prepare(_model_of(order), order.request, order.out, lambda line: task.tell(line=line))
    job.check_room(sum(not path.exists() for path in paths))
    begin = time.process_time()
    result = job.render(job.open_sink(resume=True), on_progress=task.tell_share, cancelled=task.is_dropped)
    return Done(result.measurements, time.process_time() - begin, sum(job.projection.lr_pixels))
