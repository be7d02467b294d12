"""``torch.pretend``: stands in for ``torch.cuda`` under its names, and tells PyTorch of the device."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from support.accelerator.active import MIB, TYPE, active, boards, index_of, strict_index
from support.accelerator.memory import Pool
from support.accelerator.recordings import CUDAGraph, Graph
from support.accelerator.streams import Event, Stream

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip("this PyTorch has no devices in Python", allow_module_level=True)


class _Current:
    """``torch.cuda.device``."""

    def __init__(self, device):
        self.idx = index_of(device)

    def __enter__(self):
        self._before, active().current = active().current, self.idx

    def __exit__(self, *_):
        active().current = self._before


def _of_memory(name):
    return staticmethod(lambda device=None: getattr(active().memory[index_of(device)], name))


class _Module:
    """Stands in for ``torch.cuda``, under its names."""

    Stream, Event, CUDAGraph, graph, graph_pool_handle, device = Stream, Event, CUDAGraph, Graph, Pool, _Current
    memory_allocated, memory_reserved = _of_memory("live"), _of_memory("reserved")
    max_memory_allocated, max_memory_reserved = _of_memory("peak_live"), _of_memory("peak_reserved")

    @staticmethod
    def is_available():
        return bool(boards)

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
        return len(active().memory) if boards else 0

    @staticmethod
    def current_device():
        return active().current

    @staticmethod
    def set_device(device):
        active().current = strict_index(device)

    @staticmethod
    def get_device_name(device=None):
        return active().names[index_of(device)]

    @staticmethod
    def get_device_capability(device=None):
        return active().capability

    @staticmethod
    def is_bf16_supported(including_emulation=True):
        return including_emulation or active().capability >= (8, 0)

    @staticmethod
    def get_device_properties(device=None):
        total = active().memory[index_of(device)].total
        return SimpleNamespace(
            name=active().names[index_of(device)], total_memory=total, multi_processor_count=128, L2_cache_size=64 * MIB
        )

    @staticmethod
    def synchronize(device=None):
        active().synchronize(device)

    @staticmethod
    def empty_cache():
        active().empty_cache()

    @staticmethod
    def mem_get_info(device=None):
        memory = active().memory[index_of(device)]
        return memory.free, memory.total

    @staticmethod
    def reset_peak_memory_stats(device=None):
        memory = active().memory[index_of(device)]
        memory.peak_live, memory.peak_reserved = memory.live, memory.reserved

    @staticmethod
    def set_per_process_memory_fraction(fraction, device=None):
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        active().memory[strict_index(device)].fraction = fraction

    @staticmethod
    def get_per_process_memory_fraction(device=None):
        return active().memory[strict_index(device)].fraction

    @staticmethod
    def list_gpu_processes(device=None):
        board = active()
        if not board.lists_processes:
            return "pynvml module not found, please install nvidia-ml-py"
        memory = board.memory[index_of(device)]
        own = (memory.context + memory.reserved) / MIB
        return f"GPU:{memory.index}\nprocess {os.getpid():>10d} uses {own:>12.3f} MB GPU memory"

    @staticmethod
    def device_memory_used(device=None):
        board, memory = active(), active().memory[index_of(device)]
        if not board.reads_totals:
            raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")
        return memory.others + (memory.context + memory.reserved if memory.peak_reserved else 0)

    @staticmethod
    def stream(stream):
        return stream

    @staticmethod
    def current_stream(device=None):
        return active().stream(device)

    @staticmethod
    def default_stream(device=None):
        return active().default[index_of(device)]

    @staticmethod
    def is_current_stream_capturing():
        return active().recording is not None


def methods_of_storages():
    """Methods of storages that PyTorch does not dispatch, by name."""

    def method(name, on_device):
        usual = getattr(torch.UntypedStorage, name)
        return lambda storage: on_device(storage) if storage.device.type == TYPE else usual(storage)

    return {
        "clone": method("clone", lambda storage: active().clone_storage(storage)),
        "cpu": method("cpu", lambda storage: active().storage_on_host(storage)),
    }


_library, _others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")


def _dispatch(func, *args, **kwargs):
    if func is torch.ops.aten._copy_from.default:
        source, target, asynchronous = (*args, False)[:3]
        func, args = torch.ops.aten.copy_.default, (target, source, asynchronous)
    return active().__torch_dispatch__(func, (), args, kwargs)


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
