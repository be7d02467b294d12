"""tuning: the fastest tile of a kernel for a shape, measured once on a device and remembered.

The choice changes time, never bits: candidates sum in one order. A candidate that spills registers is compiled and never
launched, because the first launch reserves its stack for all threads that a device can hold, up to gigabytes, for good.
``remember`` gives the choices a place on the disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.device.runtime import activate, device_module, hardware_name, library_versions
from engine.kernels.launch import launch, triton
from engine.kernels.machine_code import resources

Candidate = tuple[int, ...]
"""Numbers of a tile, in an order that its kernel knows."""

Start = Callable[[Candidate, Callable[..., Any]], None]
"""(candidate, launcher): passes one launch with that tile to ``launcher(kernel, grid, *arguments, **options)``."""

_ROUNDS, _LAUNCHES = 3, 8  # launches of a round are timed together: a short one takes less time than its start


class Store(Protocol):
    """Place for choices that outlives the process."""

    def read(self, name: str, /) -> object:
        """Stored data; None when there is none."""

    def write(self, name: str, data: object, /) -> None:
        """Store data; a failure is silent."""


class _Nowhere:
    def read(self, name: str, /) -> object:
        return None

    def write(self, name: str, data: object, /) -> None:
        pass


_store: Store = _Nowhere()
_chosen: dict[tuple[object, ...], Candidate] = {}


def remember(store: Store) -> None:
    """Keep choices in ``store`` from now on."""
    global _store  # noqa: PLW0603 (kernels are called from within networks, which know of no store)
    _store = store


def size_bucket(elements: int) -> int:
    """Sizes of one bucket share a choice: powers of two. Few programs leave multiprocessors idle, many do not."""
    return elements.bit_length()


def fastest(
    name: str,
    candidates: Sequence[Candidate],
    shape: tuple[int | str, ...],
    device: torch.device,
    start: Start,
    changed: Sequence[Tensor] = (),
) -> Candidate:
    """The fastest candidate, from memory or the disk, else measured.

    Args:
        name: name and version of the kernel: a change of the kernel that changes speed changes the name.
        candidates: tiles to choose from; the first one is taken where nothing can be measured.
        shape: everything of a launch that changes its speed, its size as a bucket.
        device: device of the launch.
        start: launches the kernel.
        changed: tensors that a trial must not change; they are copied.
    """
    key = (name, tuple(candidates), shape, device)
    if key not in _chosen:
        if device.type == "meta" or (device.type == "cuda" and device_module(device).is_current_stream_capturing()):
            return candidates[0]
        _chosen[key] = _stored_or_measured(name, candidates, shape, device, start, changed)
    return _chosen[key]


def _stored_or_measured(
    name: str,
    candidates: Sequence[Candidate],
    shape: tuple[int | str, ...],
    device: torch.device,
    start: Start,
    changed: Sequence[Tensor],
) -> Candidate:
    parts = [name, candidates, shape, environment(device)]
    entry = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    stored = _choice(_store.read(entry), candidates)
    if stored is not None and not _spills(stored, start, device):
        return stored
    sound = [candidate for candidate in candidates if not _spills(candidate, start, device)]
    if len(sound) < 2:
        return sound[0] if sound else candidates[0]
    with _unchanged(changed):
        seconds = {candidate: _seconds(functools.partial(start, candidate, launch), device) for candidate in sound}
    best = min(seconds, key=lambda candidate: seconds[candidate])
    if math.isinf(seconds[best]):
        return candidates[0]
    _store.write(entry, {"tile": best, "seconds": seconds[best]})
    return best


def _choice(data: object, candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate of a stored entry; None for an entry that was not written by ``fastest``."""
    if not isinstance(data, Mapping) or not isinstance(data.get("tile"), list):
        return None
    seconds = data.get("seconds")
    if type(seconds) is not float or not 0 < seconds < math.inf:
        return None
    return next((candidate for candidate in candidates if list(candidate) == data["tile"]), None)


def environment(device: torch.device) -> list[str]:
    """Everything of a machine that changes the speed of a kernel or its code: the device, the driver, the compiler."""
    module = device_module(device)
    if not hasattr(module, "get_device_properties"):
        return [str(device), *library_versions(device), f"torch {torch.__version__}"]
    properties = module.get_device_properties(device)  # cards of one name may differ in their number of multiprocessors
    hardware = [str(hardware_name(device)), f"{getattr(properties, 'multi_processor_count', None)} multiprocessors"]
    return [*hardware, *library_versions(device), f"torch {torch.__version__}"]


def _spills(candidate: Candidate, start: Start, device: torch.device) -> bool:
    """Whether the machine code of a candidate has a stack. Compiles, as its first launch would; launches nothing."""
    stack = 0

    def compiled(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        nonlocal stack
        stack = _stack(kernel, grid, arguments, options, device)

    start(candidate, compiled)
    return stack > 0


def _stack(kernel: Any, grid: tuple[int, ...], arguments: Any, options: Any, device: torch.device) -> int:  # noqa: ANN401
    with activate(device):
        cubin = kernel.warmup(*arguments, grid=grid, **options).asm["cubin"]
    try:
        return resources(cubin).stack
    except (OSError, subprocess.CalledProcessError):
        return 1  # unknown: not launched


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """Least time of a launch; infinite where the device has not the shared memory for it."""
    times = []
    with activate(device):
        try:
            for _ in range(_ROUNDS + 1):  # the first one warms up
                begin, end = (device_module(device).Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(_LAUNCHES):
                    call()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3 / _LAUNCHES)
        except triton.runtime.errors.OutOfResources:
            return math.inf
    return float(min(times[1:]))


@contextlib.contextmanager
def _unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Undo what a block writes into these tensors."""
    copies = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
