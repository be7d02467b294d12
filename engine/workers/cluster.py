"""The cluster that a user names: one that runs, or processes of this machine, one for each device."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker

from engine.container import cpu_count
from engine.device.memory import free_host
from engine.device.runtime import DEFAULT_TYPE, device_module
from engine.errors import UsageError, option
from engine.measure import default_memory
from engine.workers.tasks import DEVICE

LOCAL, AUTO = "local", "auto"

GPU = "GPU"
"""Resource of a worker with a GPU; a task on one takes all of it."""

_PAUSED = 0.8
"""Share of its memory at which Dask pauses a worker, unless the configuration says otherwise."""

_CONNECT = "10 s"


class LocalWorker(Worker):  # type: ignore[misc]
    """A worker that leaves Ctrl-C and the end of a terminal to the command, which then lets it end the shards it writes."""

    def __init__(self, *arguments: object, **options: object) -> None:
        for name in ("SIGINT", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(signal.Signals[name], signal.SIG_IGN)
        super().__init__(*arguments, **options)


@contextmanager
def connected(dask_: str | None, devices: Sequence[str], memory: int | None) -> Iterator[Client]:
    """Client of the cluster.

    Args:
        dask_: ``local``, ``local:4``, ``auto`` (the scheduler of DASK_SCHEDULER_ADDRESS, else ``local``), the address of a
            scheduler or its file; None with ``devices``.
        devices: devices of this machine, a process each.
        memory: limit of every process of this machine in bytes; by default they share what a render takes.

    Raises:
        UsageError: no such cluster.
    """
    text = dask_ or LOCAL
    if text == AUTO:
        text = dask.config.get("scheduler-address", None) or LOCAL
    if text == LOCAL or text.startswith(f"{LOCAL}:"):
        with (
            _local(devices or _local_devices(text), memory) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            yield client
        return
    options: dict[str, str] = {"scheduler_file": text} if text.endswith(".json") else {"address": text}
    if text.endswith(".json") and not Path(text).is_file():
        raise UsageError(f"{option('dask', text)}: no such file; start dask scheduler --scheduler-file {text}")
    try:
        client = Client(**options, timeout=_CONNECT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # TimeoutError is an OSError
        raise UsageError(
            f"{option('dask', text)}: no scheduler answers ({' '.join(str(error).split())[:80]}); start dask scheduler there, "
            f"or give {LOCAL}"
        ) from error
    with client:
        yield client


def _local_devices(text: str) -> list[str]:
    """Devices of ``local``, one for each GPU, else two processes on the CPU; or of ``local:4``."""
    number = text.partition(":")[2]
    gpus = [f"{DEFAULT_TYPE}:{index}" for index in range(device_module(DEFAULT_TYPE).device_count())]
    if not number and text == LOCAL:
        return gpus or ["cpu"] * min(2, cpu_count())
    if not number.isdigit() or int(number) < 1:
        raise UsageError(f"{option('dask', text)}: not a number of workers; write {LOCAL}:2")
    return [gpus[index % len(gpus)] if gpus else "cpu" for index in range(int(number))]


@contextmanager
def _local(devices: Sequence[str], memory: int | None) -> Iterator[SpecCluster]:
    """A scheduler in this process and a worker process for each device, which ends with the context."""
    fraction = dask.config.get("distributed.worker.memory.pause", _PAUSED) or 1.0
    limit = int((memory or default_memory(free_host()) // len(devices)) / fraction) + 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cpu_count() // len(devices)))
    workers = {}
    for index, device in enumerate(devices):
        is_cpu = device.partition(":")[0] == "cpu"
        name = f"{device}-{index}" if devices.count(device) > 1 else device
        workers[name] = {
            "cls": Nanny,
            "options": {
                "worker_class": LocalWorker,
                "nthreads": 1,
                "memory_limit": limit,
                "resources": {} if is_cpu else {GPU: 1},
                "env": {DEVICE: device, "OMP_NUM_THREADS": threads, "VIPS_CONCURRENCY": threads},
                "host": "127.0.0.1",
                "silence_logs": logging.CRITICAL,
            },
        }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": True, "dashboard_address": "127.0.0.1:0"},
    }
    with SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster:
        yield cluster


def parse_devices(text: str) -> tuple[str, ...]:
    """Devices of a text such as ``0,1``, ``cuda:0,cuda:1`` or ``cpu,cpu``. Raises UsageError for an empty name."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"{option('devices', text)}: an empty name; write 0,1 or cuda:0,cuda:1")
    return tuple(f"{DEFAULT_TYPE}:{name}" if name.isdigit() else name for name in names)
