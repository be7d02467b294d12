"""A pretend accelerator: a device with CUDA's rules on a machine without a GPU.

Tensors say that they live on ``pretend:0`` and their memory is the host's. A dispatch mode computes every operation on the CPU,
so pixels can be compared with a CPU's. ``torch.pretend`` has the names of ``torch.cuda`` and keeps its rules:

* Tensors of two devices do not mix; only a CPU tensor without dimensions may join. ``numpy()`` needs ``cpu()`` first.
* A device without an index is refused where ``torch.cuda`` refuses it.
* New memory holds garbage. Beyond the limit, ``torch.OutOfMemoryError`` is raised.
* A copy to pinned memory happens when the host waits for it, and not before; until then the memory holds garbage. Pinned memory
  that changes before its copy to the device has ended is an error.
* Two streams that touch the same memory must be ordered by an event, and memory must outlive the work of other streams.
* A recording runs nothing. Its memory belongs to its pool; synchronisation, pinned memory and copies from or to the host are
  refused in it. A replay repeats the operations on the same memory.
* The mode belongs to the thread that made it: threads that write files hold no tensors of the device.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip("this PyTorch has no devices in Python", allow_module_level=True)

from engine.device import memory as device_memory
from engine.device import runtime

MIB = 1 << 20
GIB = 1 << 30

_GRANULE = 512
"""Bytes to which an allocation is rounded."""

_SEGMENT = 2 * MIB
"""Bytes to which PyTorch's allocator rounds what it takes from the driver."""

_LARGEST_GARBAGE = 64 * MIB
"""Bytes of memory that is filled: larger ones would take a test seconds."""

_COPIES = ("aten::_to_copy", "aten::copy_")
_TAKE_HOST_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_SYNCHRONIZE = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::bincount", "aten::repeat_interleave", "aten::is_nonzero",
)  # fmt: skip
"""Operations whose result, or its size, the host waits for."""

TYPE = "pretend"
"""Type of the device: PyTorch's private one, under this name."""

_DLPACK_TYPE = 12
"""Number of a private device in DLPack (kDLExtDev)."""

_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class AcceleratorError(AssertionError):
    """Use of the device that CUDA would refuse, or that would give other pixels now and then."""


# Time: what has happened before what


class _Clock(dict):
    """Stream -> number of its operations that are known to have ended."""

    def learn(self, other):
        for stream, position in other.items():
            if self.get(stream, 0) < position:
                self[stream] = position

    def knows(self, stream, position):
        return self.get(stream, 0) >= position


class Stream:
    """Queue of a device: its operations run in order, those of two streams in any order."""

    def __init__(self, device=None, priority=0, **_):
        self.device = torch.device(TYPE, _index(device))
        self.clock = _Clock({self: 0})
        _board().made.append(self)

    @property
    def position(self):
        """Number of its operations so far."""
        return self.clock[self]

    def advance(self):
        """Position of the next operation, which begins after all that the host has waited for."""
        self.clock.learn(_board().host)
        self.clock[self] += 1
        return self.clock[self]

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        self.clock.learn(event.clock)
        _board().settle(self.clock)

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())

    def synchronize(self):
        _board().host_waits(self.clock)

    def query(self):
        self.synchronize()
        return True

    def __enter__(self):
        self._before = _board().streams[self.device.index]
        _board().streams[self.device.index] = self
        return self

    def __exit__(self, *_):
        _board().streams[self.device.index] = self._before


class Event:
    """Point in a stream."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self.clock = _Clock()
        self._time = 0.0

    def record(self, stream=None):
        _board().refuse_in_recording("recording an event")
        stream = stream or _board().stream()
        self.clock = _Clock(stream.clock)
        self._time = time.perf_counter()

    def wait(self, stream=None):
        (stream or _board().stream()).wait_event(self)

    def synchronize(self):
        _board().host_waits(self.clock)

    def query(self):
        self.synchronize()
        return True

    def elapsed_time(self, end):
        return (end._time - self._time) * 1000


# Memory


class _Pool:
    """Memory of recordings that share it; it is given back after the last of them."""

    def __init__(self):
        self.live = self.reserved = 0
        self.graphs = weakref.WeakSet()


class _Memory:
    """Memory of one device."""

    def __init__(self, index, total, context, others):
        self.index, self.total, self.context, self.others = index, total, context, others
        self.fraction = 1.0
        self.live = self.cached = 0
        self.pools = weakref.WeakSet()
        self.peak_live = self.peak_reserved = 0
        self.retries = 0

    @property
    def reserved(self):
        return self.cached + sum(pool.reserved for pool in self.pools)

    @property
    def free(self):
        return max(0, self.total - self.others - self.context - self.reserved)

    def allocate(self, size, pool):
        held, name = (self, "cached") if pool is None else (pool, "reserved")
        need = _round(held.live + size, _SEGMENT) - getattr(held, name)
        if need > 0 and not self._may_grow(need):
            self.retries += 1
            self.empty_cache()
            need = _round(held.live + size, _SEGMENT) - getattr(held, name)
            if not self._may_grow(need):
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / MIB:.2f} MiB. GPU {self.index} has a total capacity of "
                    f"{self.total / GIB:.2f} GiB of which {self.free / MIB:.2f} MiB is free.\nSee documentation"
                )
        held.live += size
        setattr(held, name, getattr(held, name) + max(0, need))
        self.peak_live = max(self.peak_live, self.live)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _may_grow(self, need):
        return self.reserved + need <= self.fraction * self.total and need <= self.free

    def empty_cache(self):
        self.cached = _round(self.live, _SEGMENT)
        for pool in self.pools:
            if not pool.graphs:
                pool.reserved = _round(pool.live, _SEGMENT)


class _Block:
    """Memory of one storage, and the operations that touched it last."""

    def __init__(self, storage, memory, pool, stream, size):
        self.storage, self.memory, self.pool, self.stream, self.size = storage, memory, pool, stream, size
        self.written = None
        self.read = {}

    def accesses(self):
        return list(self.read.items()) + ([self.written] if self.written else [])


def _round(size, unit):
    return -(-size // unit) * unit


# Recordings


class CUDAGraph:
    """Recorded operations, which a replay repeats on the same memory."""

    def __init__(self, keep_graph=False):
        self.operations = []
        self.read, self.written = {}, {}
        """Blocks outside the pool: storage -> block."""
        self.pool_handle = None
        self._pool_block = None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        board = _board()
        board.refuse_in_recording("a second recording")
        self.pool_handle = pool if pool is not None else _Pool()
        self.pool_handle.graphs.add(self)
        board.memory[board.current].pools.add(self.pool_handle)
        board.recording, board.recording_stream = self, board.stream()

    def capture_end(self):
        _board().recording = _board().recording_stream = None

    def pool(self):
        return self.pool_handle

    def reset(self):
        self.operations = []
        self.pool_handle.graphs.discard(self)

    def replay(self):
        board = _board()
        board.refuse_in_recording("a replay")
        for block in (*self.read.values(), *self.written.values()):
            if block.storage is None:
                raise AcceleratorError("a replay touches memory that was freed after the recording")
        stream = board.stream()
        position = stream.advance()
        for block in self.read.values():
            board.reads(block, stream, position)
        for block in self.written.values():
            board.writes(block, stream, position)
        board.uses_pool(self.pool_handle, stream, position)
        board.counts["replays"] += 1
        with _disable_current_modes(), torch.inference_mode():
            for operation in self.operations:
                operation()


class _Graph:
    """``torch.cuda.graph``, by its name here."""

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        self.graph, self.pool = cuda_graph, pool
        self.stream = stream or Stream()

    def __enter__(self):
        _board().synchronize(self.stream.device)
        gc.collect()
        _board().empty_cache()
        self.stream.__enter__()
        self.graph.capture_begin(pool=self.pool)

    def __exit__(self, *_):
        self.graph.capture_end()
        self.stream.__exit__()


# The devices


class Accelerator(TorchDispatchMode):
    """Devices, their streams and their memory; ``pretend_accelerator`` makes them."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # it would be imported for every test

    def __init__(self, devices, total, context, others, capability, lists_processes, reads_totals):
        super().__init__()
        self.capability, self.lists_processes, self.reads_totals = capability, lists_processes, reads_totals
        self.names = [f"Pretend {'ABCD'[index]}" for index in range(devices)]
        self.memory = [_Memory(index, total, context, others) for index in range(devices)]
        self.current = 0
        self.host = _Clock()
        """What the host has waited for."""
        self.counts = Counter()
        """Number of ``launches``, ``replays``, ``synchronizations``, and of every operation by name."""
        self.problems = []
        """Errors met where none can be raised."""
        self.recording = self.recording_stream = None
        self.made = []
        self._blocks = {}
        self._pinned = set()
        self._pending = []
        """Copies that have not ended: (stream, position, source's block, function that ends it)."""
        self._pool_uses = weakref.WeakKeyDictionary()
        self._forbidden = 0

    def start(self):
        self.default = [Stream(index) for index in range(len(self.memory))]
        self.streams = list(self.default)

    # Devices and streams

    def stream(self, device=None):
        """The current stream of a device."""
        return self.streams[_index(device)]

    def synchronize(self, device=None):
        """Wait for all streams of a device."""
        self.refuse_in_recording("synchronizing")
        index = _index(device)
        self.counts["synchronizations"] += 1
        every = _Clock()
        for stream in self.made:
            if stream.device.index == index:
                every.learn(stream.clock)
        self.host_waits(every)

    def host_waits(self, clock):
        """The host knows what a clock knows, and copies up to there have ended."""
        self.refuse_in_recording("synchronizing")
        self.host.learn(clock)
        self.settle(clock)

    def settle(self, clock, block=None):
        """End the copies up to a point; those from ``block`` only, if it is given."""
        ended = [entry for entry in self._pending if clock.knows(*entry[:2]) and (block is None or entry[2] is block)]
        self._pending = [entry for entry in self._pending if entry not in ended]
        for *_, finish in ended:
            finish()

    @contextmanager
    def forbid_synchronization(self):
        """Operations that make the host wait for the device raise; waiting for an event or a stream does not."""
        self._forbidden += 1
        try:
            yield
        finally:
            self._forbidden -= 1

    def _synchronizes(self, name):
        self.refuse_in_recording(f"{name}, which synchronizes,")
        self.counts["synchronizations"] += 1
        if self._forbidden:
            raise AcceleratorError(f"{name} synchronizes where nothing may")
        self.host_waits(self.stream().clock)

    def refuse_in_recording(self, what):
        if self.recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    # Order of reads and writes

    def reads(self, block, stream, position):
        self._ordered(block.written, stream, "reads memory that")
        block.read[stream] = position

    def writes(self, block, stream, position):
        for access in block.accesses():
            self._ordered(access, stream, "overwrites memory that")
        self.settle(_Clock(stream.clock), block)
        block.written = (stream, position)
        block.read = {}

    def uses_pool(self, pool, stream, position):
        self._ordered(self._pool_uses.get(pool), stream, "replays into a pool that")
        self._pool_uses[pool] = (stream, position)

    def _ordered(self, access, stream, what):
        if access is not None and access[0] is not stream and not stream.clock.knows(*access):
            raise AcceleratorError(f"a stream {what} another stream still uses: it has to wait for an event")

    # Memory

    def empty_cache(self):
        self.refuse_in_recording("emptying the cache")
        for held in self.memory:
            held.empty_cache()

    def _label(self, result, device):
        """A tensor on ``device`` with the memory of the CPU tensor ``result``, which nothing else uses."""
        storage = result.untyped_storage()
        flat = torch.empty(0, dtype=result.dtype).set_(storage, 0, (storage.nbytes() // result.itemsize,), (1,))
        pool = self.recording.pool_handle if self.recording is not None else None
        memory, size = self.memory[device.index], max(_GRANULE, _round(storage.nbytes(), _GRANULE))
        memory.allocate(size, pool)
        labelled = _relabel(flat, device.index)
        block = _Block(storage, memory, pool, self.stream(device), size)
        own = labelled.untyped_storage()
        self._blocks[own._cdata] = block
        weakref.finalize(own, self._freed, own._cdata)
        return _view(labelled, result.size(), result.stride(), result.storage_offset())

    def _freed(self, key):
        block = self._blocks.pop(key)
        (block.memory if block.pool is None else block.pool).live -= block.size
        for stream, position in block.accesses():
            known = (
                stream is block.stream
                or block.stream.clock.knows(stream, position)
                or self.host.knows(stream, position)
            )
            if not known and block.pool is None:
                self.problems.append("memory was freed while another stream still used it")
        block.storage = None

    def block(self, tensor):
        """The memory of a tensor of a device."""
        return self._blocks[tensor.untyped_storage()._cdata]

    def clone_storage(self, storage):
        """A copy of a storage, as ``copy.deepcopy`` makes it."""
        copied = torch.empty(0, dtype=torch.uint8).set_(self.storage_on_host(storage))
        return self._label(copied, storage.device).untyped_storage()

    def storage_on_host(self, storage):
        """A storage's bytes, as ``torch.save`` writes them."""
        self._synchronizes("a copy of a storage")
        return self._blocks[storage._cdata].storage.clone()

    def _on_host(self, tensor):
        """CPU tensor of the same memory."""
        return torch.empty(0, dtype=tensor.dtype).set_(
            self.block(tensor).storage, tensor.storage_offset(), tensor.size(), tensor.stride()
        )

    def _pin(self, tensor):
        self.refuse_in_recording("allocating pinned memory")
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        _fill_garbage(tensor)
        return tensor

    def _is_pinned(self, tensor):
        return tensor.untyped_storage()._cdata in self._pinned

    # Operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        own = [t for t in tensors if t.device.type == TYPE]
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        if not own and (wanted is None or wanted.type != TYPE):
            return self._run_on_host(func, name, args, kwargs)
        if wanted is not None and wanted.type == TYPE:
            wanted = torch.device(TYPE, _index(wanted))
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if name == "aten::set_":
            return func.redispatch(_CPU_KEYS, *args, **kwargs)  # another storage, no work
        if name in _COPIES:
            return self._copy(func, args, kwargs, wanted)
        device = wanted or own[0].device
        self._check_devices(name, tensors, own, device)
        if name in _SYNCHRONIZE or (name in _TAKE_HOST_INDICES and _synchronizing_indices(args)):
            self._synchronizes(name)
        return self._compute(func, name, args, kwargs, device)

    def _run_on_host(self, func, name, args, kwargs):
        if name in ("aten::is_pinned",):
            return self._is_pinned(args[0])
        if name in ("aten::_pin_memory", "aten::pin_memory"):
            return self._pin(torch.empty_like(args[0])).copy_(args[0])
        if kwargs.pop("pin_memory", None):
            return self._pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _check_devices(self, name, tensors, own, device):
        for tensor in tensors:
            joins = tensor.device == own[0].device or (tensor.device.type == "cpu" and tensor.dim() == 0)
            if not joins and not (name in _TAKE_HOST_INDICES and tensor.device.type == "cpu"):
                raise RuntimeError(
                    f"{name}: Expected all tensors to be on the same device, but found at least two devices, "
                    f"{own[0].device} and {tensor.device}!"
                )

    def _compute(self, func, name, args, kwargs, device):
        stream = self.stream(device)
        if self.recording is not None and stream is not self.recording_stream:
            raise RuntimeError(
                "CUDA error: operation would make the legacy stream depend on a capturing blocking stream"
            )
        originals, aliases = {}, {}

        def lower(value):
            if not isinstance(value, Tensor):
                return value
            if value.device.type != TYPE:
                return value.clone() if self.recording is not None else value
            alias = aliases.get(id(value))
            if alias is None:
                alias = aliases[id(value)] = self._on_host(value)
                originals[id(alias)] = value
            return alias

        lowered, options = tree_map(lower, args), tree_map(lower, kwargs)
        if "device" in options:
            options["device"] = torch.device("cpu")
        options.pop("pin_memory", None)
        written = _written(func, args, kwargs)
        if self.recording is not None and written:
            self.counts["launches"] += 1
            self._record(lambda: func(*lowered, **options), originals.values(), written)
            return args[0] if func._schema.returns else None
        is_view = not written and any(r.alias_info is not None for r in func._schema.returns)
        position = stream.position if is_view or self.recording is not None else stream.advance()
        if not is_view:
            self.counts["launches"] += 1
            self.counts[name] += 1
            if self.recording is None:
                self._check_order(originals.values(), written, stream, position)
        storages = {alias.untyped_storage()._cdata: originals[id(alias)] for alias in aliases.values()}
        result = func(*lowered, **options)
        fresh = []

        def lift(value):
            if not isinstance(value, Tensor):
                return value
            if id(value) in originals:
                return originals[id(value)]
            base = storages.get(value.untyped_storage()._cdata)
            if base is not None:
                if value.dtype != base.dtype:
                    base = torch.ops.aten.view.dtype.redispatch(_CPU_KEYS, base.flatten(), value.dtype)
                return _view(base, value.size(), value.stride(), value.storage_offset())
            if "empty" in name:
                _fill_garbage(value)
            labelled = self._label(value, device)
            fresh.append((value, labelled))
            return labelled

        lifted = tree_map(lift, result)
        if self.recording is not None and not is_view:
            self._record_results(func, lowered, options, result, originals.values(), fresh)
        else:
            for _, labelled in fresh:
                self.block(labelled).written = (stream, position)
        return lifted

    def _check_order(self, tensors, written, stream, position):
        for tensor in tensors:
            if any(tensor is w for w in written):
                self.writes(self.block(tensor), stream, position)
            else:
                self.reads(self.block(tensor), stream, position)

    def _record(self, operation, read, written):
        """Add an operation that writes to tensors which exist already."""
        graph = self.recording
        graph.operations.append(operation)
        for tensor in read:
            block, key = self.block(tensor), tensor.untyped_storage()._cdata
            if block.pool is None:
                graph.read[key] = block
        for tensor in written:
            block, key = self.block(tensor), tensor.untyped_storage()._cdata
            if block.pool is None:
                graph.written[key] = block
                graph.read.pop(key, None)

    def _record_results(self, func, lowered, options, result, read, fresh):
        """Add an operation with results of its own. They hold garbage until the replay."""
        targets = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for value, _ in fresh:
            _fill_garbage(value)

        def operation():
            again = [value for value in tree_leaves(func(*lowered, **options)) if isinstance(value, Tensor)]
            for target, value in zip(targets, again, strict=True):
                target.copy_(value)

        if "empty" not in func._schema.name:
            self._record(operation, read, ())

    # Copies

    def _copy(self, func, args, kwargs, wanted):
        name = func._schema.name
        if name == "aten::copy_":
            target, source = args[0], args[1]
            asynchronous = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
        else:
            source = args[0]
            asynchronous = bool(kwargs.pop("non_blocking", False))
            kwargs.pop("pin_memory", None)
            device = wanted or source.device
            if device == source.device:
                return self._compute(func, name, args, kwargs, device)
            kwargs["device"] = torch.device("cpu")
            sample = source if source.device.type == "cpu" else self._on_host(source)
            shape = torch.empty_like(
                sample, dtype=kwargs.get("dtype"), memory_format=kwargs.get("memory_format") or torch.preserve_format
            )
            if device.type == TYPE:
                _fill_garbage(shape)
                target = self._label(shape, device)
            else:
                target = self._pin(shape) if asynchronous else shape
        if target.device == source.device:
            return self._compute(func, name, args, kwargs, target.device)
        if self.recording is not None:
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing (a copy from or to the host)"
            )
        if source.device.type == "cpu" and source.dim() == 0 and name == "aten::copy_":
            self._on_host(target).copy_(source)
            self._touch(target, source)
            return target
        if source.device.type == "cpu":
            self._upload(target, source, asynchronous)
        elif target.device.type == "cpu":
            self._download(target, source, asynchronous)
        else:
            streams = self.stream(source.device), self.stream(target.device)
            streams[1].wait_stream(streams[0])
            self._on_host(target).copy_(self._on_host(source))
            self._touch(target, source)
            streams[0].wait_stream(streams[1])
        return target

    def _touch(self, target, source):
        """Count a copy, and check its order. Returns (stream, position)."""
        stream = self.stream(target.device if target.device.type == TYPE else source.device)
        position = stream.advance()
        self.counts["copies"] += 1
        if source.device.type == TYPE:
            self.reads(self.block(source), stream, position)
        if target.device.type == TYPE:
            self.writes(self.block(target), stream, position)
        return stream, position

    def _upload(self, target, source, asynchronous):
        stream, position = self._touch(target, source)
        self._on_host(target).copy_(source)
        if not (asynchronous and self._is_pinned(source)):
            self._synchronizes("a copy of pageable memory" if asynchronous else "a blocking copy to the device")
            return
        before = source.clone()

        def finish():
            if not torch.equal(_bytes(source), _bytes(before)):
                raise AcceleratorError("pinned memory was changed before its copy to the device had ended")

        self._pending.append((stream, position, None, finish))

    def _download(self, target, source, asynchronous):
        stream, position = self._touch(target, source)
        values = self._on_host(source)
        if asynchronous and self._is_pinned(target):
            _fill_garbage(target)
            self._pending.append((stream, position, self.block(source), lambda: target.copy_(values)))
            return
        self._synchronizes("a copy to pageable memory" if asynchronous else "a blocking copy to the host")
        target.copy_(values)


def _relabel(flat, index):
    """The same memory as a tensor of ``pretend:index``: DLPack carries the device beside the address."""
    capsule = torch._C._to_dlpack(flat)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    device = (ctypes.c_int32 * 2).from_address(get(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    device[:] = [_DLPACK_TYPE, index]
    return torch._C._from_dlpack(capsule)


def _view(base, size, stride, offset):
    return torch.ops.aten.as_strided.default.redispatch(_CPU_KEYS, base, list(size), list(stride), offset)


def _bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def _fill_garbage(tensor):
    """Fill memory as if nothing had been written to it: NaN, or an integer with all bits set."""
    if tensor.dtype is torch.bool or tensor.untyped_storage().nbytes() > _LARGEST_GARBAGE:
        return
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max if torch.iinfo(tensor.dtype).min == 0 else -1)


def _written(func, args, kwargs):
    """Arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    found = []
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _synchronizing_indices(args):
    """Masks have as many results as true values, which the host must know, and indices of the host are copied."""
    indices = [i for i in args[1] if i is not None]
    return any(i.dtype in (torch.bool, torch.uint8) or i.device.type == "cpu" for i in indices)


# torch.pretend


_boards: list[Accelerator] = []


def _board() -> Accelerator:
    return _boards[-1]


def _index(device=None):
    """Index of a device; the current one for None and for a device without an index."""
    if device is None:
        return _board().current
    if not isinstance(device, int):
        device = torch.device(device)
        if device.type != TYPE:
            raise ValueError(f"Expected a {TYPE} device, but got: {device}")
        device = _board().current if device.index is None else device.index
    if device >= len(_board().memory):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device


def _strict_index(device=None):
    """For functions that refuse a device without an index."""
    if device is not None and not isinstance(device, int) and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
    return _index(device)


class _Current:
    """``torch.cuda.device``."""

    def __init__(self, device):
        self.idx = _index(device)

    def __enter__(self):
        self._before, _board().current = _board().current, self.idx

    def __exit__(self, *_):
        _board().current = self._before


def _of_memory(name):
    return staticmethod(lambda device=None: getattr(_board().memory[_index(device)], name))


class _Module:
    """Stands in for ``torch.cuda``, under its names."""

    Stream, Event, CUDAGraph, graph, graph_pool_handle, device = Stream, Event, CUDAGraph, _Graph, _Pool, _Current
    memory_allocated, memory_reserved = _of_memory("live"), _of_memory("reserved")
    max_memory_allocated, max_memory_reserved = _of_memory("peak_live"), _of_memory("peak_reserved")

    @staticmethod
    def is_available():
        return bool(_boards)

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def device_count():
        return len(_board().memory) if _boards else 0

    @staticmethod
    def current_device():
        return _board().current

    @staticmethod
    def set_device(device):
        _board().current = _strict_index(device)

    @staticmethod
    def get_device_name(device=None):
        return _board().names[_index(device)]

    @staticmethod
    def get_device_capability(device=None):
        return _board().capability

    @staticmethod
    def is_bf16_supported(including_emulation=True):
        return including_emulation or _board().capability >= (8, 0)

    @staticmethod
    def get_device_properties(device=None):
        total = _board().memory[_index(device)].total
        return SimpleNamespace(
            name=_board().names[_index(device)], total_memory=total, multi_processor_count=128, L2_cache_size=64 * MIB
        )

    @staticmethod
    def synchronize(device=None):
        _board().synchronize(device)

    @staticmethod
    def empty_cache():
        _board().empty_cache()

    @staticmethod
    def mem_get_info(device=None):
        memory = _board().memory[_index(device)]
        return memory.free, memory.total

    @staticmethod
    def reset_peak_memory_stats(device=None):
        memory = _board().memory[_index(device)]
        memory.peak_live, memory.peak_reserved = memory.live, memory.reserved

    @staticmethod
    def set_per_process_memory_fraction(fraction, device=None):
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        _board().memory[_strict_index(device)].fraction = fraction

    @staticmethod
    def get_per_process_memory_fraction(device=None):
        return _board().memory[_strict_index(device)].fraction

    @staticmethod
    def list_gpu_processes(device=None):
        board = _board()
        if not board.lists_processes:
            return "pynvml module not found, please install nvidia-ml-py"
        memory = board.memory[_index(device)]
        own = (memory.context + memory.reserved) / MIB
        return f"GPU:{memory.index}\nprocess {os.getpid():>10d} uses {own:>12.3f} MB GPU memory"

    @staticmethod
    def device_memory_used(device=None):
        board, memory = _board(), _board().memory[_index(device)]
        if not board.reads_totals:
            raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")
        return memory.others + (memory.context + memory.reserved if memory.peak_reserved else 0)

    @staticmethod
    def stream(stream):
        return stream

    @staticmethod
    def current_stream(device=None):
        return _board().stream(device)

    @staticmethod
    def default_stream(device=None):
        return _board().default[_index(device)]

    @staticmethod
    def is_current_stream_capturing():
        return _board().recording is not None


def _methods_of_storages():
    """Methods of storages that PyTorch does not dispatch, by name."""

    def method(name, on_device):
        usual = getattr(torch.UntypedStorage, name)
        return lambda storage: on_device(storage) if storage.device.type == TYPE else usual(storage)

    return {
        "clone": method("clone", lambda storage: _board().clone_storage(storage)),
        "cpu": method("cpu", lambda storage: _board().storage_on_host(storage)),
    }


_library, _others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")


def _dispatch(func, *args, **kwargs):
    if func is torch.ops.aten._copy_from.default:
        source, target, asynchronous = (*args, False)[:3]
        func, args = torch.ops.aten.copy_.default, (target, source, asynchronous)
    return _board().__torch_dispatch__(func, (), args, kwargs)


def _autocast(func, *args, **kwargs):
    """An operation in autocast's dtype: PyTorch has none for a private device."""

    def lower(value):
        is_float = isinstance(value, Tensor) and value.dtype is torch.float32 and value.device.type == TYPE
        return value.to(torch.get_autocast_dtype(TYPE)) if is_float else value

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return func(*tree_map(lower, args), **tree_map(lower, kwargs))


def _register():
    """Name PyTorch's private device type, which lasts as long as the process."""
    _setup_privateuseone_for_python_backend(TYPE, _Module)
    _others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.ops.aten
    for func in (aten.conv2d.default, aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default):
        _library.impl(func, partial(_autocast, func), "AutocastPrivateUse1")
    # No mode sees how ``torch.tensor`` moves a list to a device.
    for func in (
        torch.ops.aten.empty_strided.default,
        torch.ops.aten._to_copy.default,
        torch.ops.aten._copy_from.default,
    ):
        _library.impl(func, partial(_dispatch, func), "PrivateUse1")


_register()


@contextmanager
def pretend_accelerator(
    *,
    devices=2,
    total=8 * GIB,
    context=300 * MIB,
    others=0,
    capability=(8, 9),
    lists_processes=True,
    reads_totals=False,
):
    """Make the devices exist within the block, for the thread that entered it, and be the engine's default.

    Args:
        devices: number of devices; the first is the current one.
        total: bytes of each device.
        context: bytes that the process holds outside PyTorch's allocator.
        others: bytes that other processes hold.
        capability: compute capability.
        lists_processes: whether NVML lists the bytes of each process.
        reads_totals: whether NVML reads the bytes in use on a device that is not open.

    Yields:
        The ``Accelerator``.

    Raises:
        AcceleratorError: at the end, for errors where none could be raised.
    """
    board = Accelerator(devices, total, context, others, capability, lists_processes, reads_totals)
    _boards.append(board)
    with ExitStack() as stack:
        stack.callback(_boards.pop)
        board.start()
        # The threads that compute gradients know one device.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(mock.patch.object(runtime, "DEFAULT_TYPE", TYPE))
        stack.enter_context(mock.patch.dict(device_memory._contexts, clear=True))
        for name, method in _methods_of_storages().items():
            stack.enter_context(mock.patch.object(torch.UntypedStorage, name, method, create=True))
        stack.enter_context(board)
        yield board
        for index in range(devices):
            board.synchronize(index)
    if board.problems:
        raise AcceleratorError("; ".join(sorted(set(board.problems))))
