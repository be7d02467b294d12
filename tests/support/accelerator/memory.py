"""Memory of a device: its limit, who holds it, and the garbage in what is new."""

import ctypes
import weakref

import torch

from support.accelerator.active import GIB, MIB

GRANULE = 512
"""Bytes to which an allocation is rounded."""

SEGMENT = 2 * MIB
"""Bytes to which PyTorch's allocator rounds what it takes from the driver."""

_LARGEST_GARBAGE = 64 * MIB
"""Bytes of memory that is filled: larger ones would take a test seconds."""

_DLPACK_TYPE = 12
"""Number of a private device in DLPack (kDLExtDev)."""

CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Pool:
    """Memory of recordings that share it; it is given back after the last of them."""

    def __init__(self):
        self.live = self.reserved = 0
        self.graphs = weakref.WeakSet()


class Memory:
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
        need = round_up(held.live + size, SEGMENT) - getattr(held, name)
        if need > 0 and not self._may_grow(need):
            self.retries += 1
            self.empty_cache()
            need = round_up(held.live + size, SEGMENT) - getattr(held, name)
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
        self.cached = round_up(self.live, SEGMENT)
        for pool in self.pools:
            if not pool.graphs:
                pool.reserved = round_up(pool.live, SEGMENT)


class Block:
    """Memory of one storage, and the operations that touched it last."""

    def __init__(self, storage, memory, pool, stream, size):
        self.storage, self.memory, self.pool, self.stream, self.size = storage, memory, pool, stream, size
        self.written = None
        self.read = {}

    def accesses(self):
        return list(self.read.items()) + ([self.written] if self.written else [])


def round_up(size, unit):
    return -(-size // unit) * unit


def relabel(flat, index):
    """The same memory as a tensor of ``pretend:index``: DLPack carries the device beside the address."""
    capsule = torch._C._to_dlpack(flat)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    device = (ctypes.c_int32 * 2).from_address(get(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    device[:] = [_DLPACK_TYPE, index]
    return torch._C._from_dlpack(capsule)


def view(base, size, stride, offset):
    return torch.ops.aten.as_strided.default.redispatch(CPU_KEYS, base, list(size), list(stride), offset)


def bytes_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def fill_garbage(tensor):
    """Fill memory as if nothing had been written to it: NaN, or an integer with all bits set."""
    if tensor.dtype is torch.bool or tensor.untyped_storage().nbytes() > _LARGEST_GARBAGE:
        return
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max if torch.iinfo(tensor.dtype).min == 0 else -1)
