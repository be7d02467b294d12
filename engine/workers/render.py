"""A render by the workers of a cluster: the store is begun, its shares are given out, and it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.errors import Interrupted, ResumeError, option
from engine.io.objects import Place
from engine.io.part_sink import lock_parts, unlock_parts
from engine.io.provenance import stored_provenance
from engine.parts import PartsMissing, finish
from engine.plan.parts import Part
from engine.plan.request import Request
from engine.result import Measurements, Progress, RenderResult
from engine.workers.conduct import Conductor, Work
from engine.workers.tasks import Begun, Done, Order, begin, order_of, render_share

_ROUNDS = 3
"""Times that shares are given out: again, where shards turn out to be damaged."""


class WorkersRender:
    """A render whose store is begun; ``run`` renders and finishes it.

    Attributes:
        begun: its plan, and what its shares miss.
        results: what the shares of ``run`` took.
    """

    def __init__(self, conductor: Conductor, order: Order, begun: Begun) -> None:
        self._conductor, self._order, self.begun = conductor, order, begun
        self.results: list[Done] = []

    @classmethod
    def begin(
        cls,
        conductor: Conductor,
        model: Path | str | None,
        request: Request,
        out: Place,
        *,
        shares: int | None = None,
        accept_backend: bool = False,
        notes: Mapping[str, Any] = MappingProxyType({}),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> WorkersRender:
        """Let a worker plan and make the store, or go on with the one that is there. Errors as of ``engine.render``."""
        order = order_of(model, request, out, conductor.topic, accept_backend=accept_backend, notes=notes)
        work = Work("plan", begin, (order, max(1, len(conductor.workers())), shares))
        begun = conductor.run([work], device=request.device, cancelled=cancelled)[0]
        if begun.lost:
            conductor.log(f"{out}: {begun.lost} damaged shards; rendered again")
        return cls(conductor, order, begun)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return max(1, len(self._conductor.workers()))

    @property
    def done(self) -> float:
        """Share of the work that earlier runs finished."""
        total = max(self.begun.projection.seconds, 1e-9)
        return max(0.0, min(1.0, 1 - sum(self.begun.seconds) / total))

    @property
    def seconds(self) -> float:
        """Expected time of this run."""
        left = [seconds for seconds in self.begun.seconds if seconds]
        return max(sum(left) / self.workers, max(left, default=0.0))

    def run(
        self,
        *,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> RenderResult:
        """Render the shares that miss shards, and finish the store. Arguments and errors as of ``engine.render``."""
        begun, out, start = self.begun, self._order.out, time.perf_counter()
        if (stored_provenance(out) or {}).get("complete"):
            return self._result(start)
        with _giving(out):
            parts = [part for part, left in zip(begun.shares.parts, begun.seconds, strict=True) if left]
            for attempt in range(_ROUNDS):
                try:
                    self.results += self._share_out(parts, on_progress, cancelled)
                except Interrupted:
                    raise Interrupted(
                        f"{self._order.out}: stopped after whole shards; the same command goes on"
                    ) from None
                try:
                    _finish(out)
                    break
                except PartsMissing as error:
                    parts = [missing.part for missing in error.parts if missing.part is not None]
                    if attempt == _ROUNDS - 1 or not parts:
                        raise
        return self._result(start)

    def _share_out(
        self, parts: list[Part], on_progress: Callable[[Progress], None], cancelled: Callable[[], bool]
    ) -> list[Done]:
        begun = self.begun
        weights = [begun.seconds[part.number - 1] or 1.0 for part in parts]
        shares, whole = [0.0] * len(parts), max(sum(weights), 1e-9)
        total = sum(begun.projection.lr_pixels)

        def advance(index: int, share: float) -> None:
            shares[index] = max(shares[index], share)
            done = sum(weight * share for weight, share in zip(weights, shares, strict=True)) / whole
            on_progress(Progress(round(total * done), total, begun.plan.stages[-1].step, min(1.0, done)))

        works = [
            Work(f"render-part-{part.number}-of-{part.count}", render_share, (self._order, part)) for part in parts
        ]
        return self._conductor.run(works, on_share=advance, cancelled=cancelled, device=self._order.request.device)

    def _result(self, start: float) -> RenderResult:
        all_ = [share.measurements for share in self.results]
        plan = self.begun.plan
        measurements = Measurements(
            seconds=time.perf_counter() - start,
            compute_seconds=sum(m.compute_seconds for m in all_),
            write_seconds=sum(m.write_seconds for m in all_),
            writes=sum(m.writes for m in all_),
            host_peak=max((m.host_peak for m in all_), default=0),
            working_peak=max((m.working_peak for m in all_), default=0),
            device_peak=max((m.device_peak for m in all_), default=0),
            tiles_redone_in_fp32=sum(m.tiles_redone_in_fp32 for m in all_),
            cores=all_[0].cores if all_ else tuple(cut.core[0] for cut in plan.stages),
            seam_error_levels=max((m.seam_error_levels for m in all_ if m.seam_error_levels is not None), default=None),
        )
        return RenderResult(self._order.out, plan, self.begun.projection, measurements)


@contextmanager
def _giving(out: Place) -> Iterator[None]:
    """Hold the lock of the process that gives out the shares of a store."""
    provenance = stored_provenance(out)
    if provenance is None:
        raise ResumeError(
            f"{out}: made by a worker, and not to be seen here; give an {option('out')} in a folder that all machines see"
        )
    lock = lock_parts(out, provenance)
    try:
        yield
    finally:
        unlock_parts(out, provenance, lock)


def _finish(out: Place) -> None:
    """Finish a store. A worker that is stopped or cut off may still hold a share that another one has rendered."""
    try:
        finish(out)
    except PartsMissing:
        raise
    except ResumeError:
        finish(out, beside_parts=True)
