"""Works of one client on the workers of a cluster: given out, watched, given again, cancelled."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from distributed import Client, Future
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from engine.errors import EngineError, Interrupted, RenderError, UsageError, option
from engine.workers.cluster import GPU
from engine.workers.tasks import Answer

_RETRIES = 2
"""Further attempts after an error that is not the engine's."""

_TICK = 0.2
"""Seconds between two looks at Ctrl-C."""

_LOOK = 1.0
"""Seconds between two looks at the workers."""

_LETTING_GO = 60.0
"""Seconds that workers may take to end the shards that they write, after a request to stop."""

_LET_IN = 3.0
"""Seconds without a worker before a line says so."""


class WorkersError(EngineError):
    """The cluster is lost, or no worker can do the work."""


@dataclass(frozen=True, slots=True)
class Work:
    """A call of a function of ``engine.workers.tasks``."""

    name: str
    """Name in the dashboard, which groups works by the words before the first number."""
    function: Callable[..., Answer[Any]]
    arguments: tuple[object, ...]


class Conductor:
    """Gives works to workers and collects their answers.

    Dask gives a work of a lost worker to another one. A worker that refuses, as it has too little memory, another processor or
    a full disk, gets no further work of this conductor, and a line says why.

    Attributes:
        topic: topic of events that tasks send their progress to.
    """

    def __init__(self, client: Client, log: Callable[[str], None]) -> None:
        self.client, self.log = client, log
        self.topic = f"engine-{uuid4().hex[:12]}"
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._refused: dict[str, Exception] = {}
        self._attempt = 0
        client.subscribe_topic(self.topic, lambda event: self._inbox.put(("event", event[1])))

    def close(self) -> None:
        """Let the events go."""
        if self.client.status == "running":
            self.client.unsubscribe_topic(self.topic)

    def workers(self) -> list[str]:
        """Addresses of the workers that have not refused."""
        return [address for address in self._all_workers() if address not in self._refused]

    def run(
        self,
        works: Sequence[Work],
        *,
        on_share: Callable[[int, float], None] = lambda index, share: None,
        cancelled: Callable[[], bool] = lambda: False,
        device: str | None = None,
    ) -> list[Any]:
        """Do all works, and return their results in order.

        Args:
            works: the works.
            on_share: called with (index of a work, share of it that is done).
            cancelled: asked often; True cancels what is left, and waits for workers to let go of it.
            device: device of the request; a GPU takes the resource ``GPU`` of a worker.

        Raises:
            Interrupted: ``cancelled`` returned True.
            EngineError: a work failed wherever it was tried, or the cluster is lost.
        """
        self._works, self._device = works, device
        self._results: dict[int, Any] = {}
        self._given: dict[str, tuple[int, Future, list[str] | None]] = {}
        self._running: set[tuple[str, str]] = set()
        self._since_empty: float | None = None
        try:
            for index in range(len(works)):
                self._give(index)
            looked = time.monotonic()
            while len(self._results) < len(works):
                if cancelled():
                    raise Interrupted("stopped")
                with suppress(queue.Empty):
                    self._receive(*self._inbox.get(timeout=_TICK), on_share)
                if (now := time.monotonic()) - looked >= _LOOK:
                    looked = now
                    self._look_after()
        except BaseException:
            self._cancel()
            raise
        return [self._results[index] for index in range(len(works))]

    def _give(self, index: int) -> None:
        work = self._works[index]
        allowed = self.workers() if self._refused else None
        if allowed == [] and self._all_workers():
            raise next(iter(self._refused.values()))
        self._attempt += 1
        key = f"{work.name}-{self.topic[-6:]}-{self._attempt}"
        future = self.client.submit(
            work.function, *work.arguments, key=key, pure=False, retries=_RETRIES, workers=allowed or None,
            resources=self._resources(), allow_other_workers=False,
        )  # fmt: skip
        self._given[key] = (index, future, allowed)
        future.add_done_callback(lambda done: self._inbox.put(("done", done)))

    def _receive(self, kind: str, value: Any, on_share: Callable[[int, float], None]) -> None:  # noqa: ANN401
        if kind == "event":
            key, worker = value["key"], value["worker"]
            if "line" in value:
                self.log(value["line"])
            if "begun" in value:
                self._running.add((key, worker))
            if "ended" in value:
                self._running.discard((key, worker))
            if "share" in value and key in self._given:
                on_share(self._given[key][0], value["share"])
            return
        if (given := self._given.pop(value.key, None)) is None:  # given again
            return
        index = given[0]
        if value.status == "cancelled":
            raise self._lost()
        try:
            answer: Answer[Any] = value.result()
        except KilledWorker as error:
            raise WorkersError(
                f"{self._works[index].name}: its workers died {error.allowed_failures + 1} times; look at their logs, or give "
                f"a smaller {option('memory')}"
            ) from error
        except (FutureCancelledError, OSError) as error:
            if self.client.status != "running":
                raise self._lost() from error
            raise
        except ModuleNotFoundError as error:
            raise WorkersError(f"workers: {error}; install the engine and its extra dask there, too") from error
        if answer.error is None:
            self._results[index] = answer.result
            on_share(index, 1.0)
            return
        if isinstance(answer.error, (RenderError, UsageError)):
            raise answer.error
        if answer.worker not in self._refused:
            self._refused[answer.worker] = answer.error
            if self.workers():
                text = answer.error.for_command_line() if isinstance(answer.error, EngineError) else str(answer.error)
                self.log(f"worker {answer.name} gets no more work: {text}")
        self._give(index)

    def _look_after(self) -> None:
        """Give works again whose allowed workers are gone, and forget what lost workers ran."""
        if self.client.status != "running":
            raise self._lost()
        alive = set(self._all_workers())
        self._running = {(key, worker) for key, worker in self._running if worker in alive}
        for key, (index, future, allowed) in list(self._given.items()):
            if allowed is not None and alive and not alive & set(allowed):
                del self._given[key]
                self.client.cancel([future])
                self._give(index)
        now = time.monotonic()
        if any(worker["status"] == "running" for worker in self._infos().values()):
            self._since_empty = None
        elif self._since_empty is None:
            self._since_empty = now
        elif 0 < self._since_empty < now - _LET_IN:
            self.log("waiting for a worker: none is there, or all are paused, as they have too little memory")
            self._since_empty = float("inf")

    def _cancel(self) -> None:
        """Cancel all works, and wait until their workers have let go of the store."""
        if self.client.status != "running" or not self._given:
            return
        self.client.cancel([future for _, future, _ in self._given.values()], force=True)
        end = time.monotonic() + _LETTING_GO
        while self._running and time.monotonic() < end and self.client.status == "running":
            try:
                kind, value = self._inbox.get(timeout=_TICK)
            except queue.Empty:
                alive = set(self._all_workers())
                self._running = {(key, worker) for key, worker in self._running if worker in alive}
                continue
            if kind == "event" and "ended" in value:
                self._running.discard((value["key"], value["worker"]))

    def _resources(self) -> dict[str, int] | None:
        """One GPU for a render on GPUs: for a device that is none of the CPU, or where a worker has one."""
        kind = (self._device or "").partition(":")[0]
        has_gpus = any(GPU in worker["resources"] for worker in self._infos().values())
        return {GPU: 1} if (kind and kind != "cpu") or (not kind and has_gpus) else None

    def _infos(self) -> dict[str, dict[str, Any]]:
        """What the scheduler knows of every worker, by its address."""
        infos: dict[str, dict[str, Any]] = self.client.scheduler_info(n_workers=-1)["workers"]
        return infos

    def _all_workers(self) -> list[str]:
        return list(self.client.nthreads())

    def _lost(self) -> WorkersError:
        return WorkersError(f"{option('dask')}: the scheduler is lost; start one, and repeat the command to go on")
