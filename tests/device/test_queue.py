"""Device queues, out-of-memory errors and the driver's list of processes."""

import pytest
import torch
from support.devices import needs_gpu

from engine.device.memory import PeakMemory, device_bytes, device_limit, free_device, process_bytes
from engine.device.queue import (
    CudaDeviceQueue,
    DeviceQueue,
    OutOfDeviceMemory,
    device_queue,
    full_float32,
    memory_errors,
)

CPU = torch.device("cpu")

LISTING = """GPU:0
process       1234 uses      512.500 MB GPU memory
process      12345 uses    20480.000 MB GPU memory"""
"""Format of ``torch.cuda.list_gpu_processes``."""


def test_process_bytes_matches_the_whole_id():
    assert process_bytes(LISTING, 12345) == 20480 << 20
    assert process_bytes(LISTING, 1234) == 512.5 * (1 << 20)
    assert process_bytes(LISTING, 123) is None
    assert process_bytes("pynvml module not found, please install nvidia-ml-py", 1) is None


OTHER_TEXTS = (
    "FIND was unable to find an engine to execute this computation",
    "GET was unable to find an engine to execute this computation",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "MPS backend out of memory (MPS allocated: 17.90 GB, other allocations: 13.28 MB, max allowed: 18.13 GB).",
    "Triton Error [CUDA]: out of memory",
)
"""Exhausted devices, in the words of cuDNN, cuBLAS, the driver (from a recording or a kernel's code) and MPS."""


def test_memory_errors_by_class():
    errors = [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nSee documentation"), OutOfDeviceMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes."), MemoryError),
        *((RuntimeError(text), OutOfDeviceMemory) for text in OTHER_TEXTS),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ]
    for error, kind in errors:
        with pytest.raises((MemoryError, RuntimeError)) as caught, memory_errors():
            raise error
        assert type(caught.value) is kind
        assert str(caught.value) == str(error).splitlines()[0]


def test_full_float32_disables_tf32_and_restores_it(monkeypatch):
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        inside = []

        def fail(inside=inside):
            inside.append(torch.backends.cudnn.allow_tf32)
            raise KeyError

        with pytest.raises(KeyError), full_float32():
            fail()
        assert inside == [False]
        assert torch.backends.cudnn.allow_tf32 == before


def test_a_cpu_has_no_memory_of_its_own():
    assert free_device(CPU) is None
    assert device_bytes(CPU) == 0
    with device_limit(CPU, 1), PeakMemory(CPU) as peak:
        torch.zeros(1000)
    assert peak.device == peak.device_start == 0


def test_cpu_queue_runs_in_program_order():
    queue = device_queue(CPU)
    assert type(queue) is DeviceQueue
    host, device, runs = queue.pinned(4, torch.uint8), torch.arange(4, dtype=torch.uint8), []
    work = queue.capture(lambda: runs.append(device.add_(1)))
    queue.warm_up(work)
    work()
    queue.copy_to_host([(device, host)]).synchronize()
    queue.record_event().synchronize()
    assert host.tolist() == [2, 3, 4, 5]
    assert len(runs) == 2


@needs_gpu
def test_cuda_queue_replays_and_copies_in_order():
    device = torch.device("cuda")
    queue = device_queue(device)
    assert type(queue) is CudaDeviceQueue
    values, host = torch.zeros(1 << 20, device=device), queue.pinned(1 << 20, torch.float32)
    assert host.is_pinned()
    queue.warm_up(lambda: values.add_(1))
    replay = queue.capture(lambda: values.mul_(2).add_(1))
    values.zero_()
    for k in range(1, 6):
        replay()
        queue.copy_to_host([(values, host)]).synchronize()
        assert host.unique().tolist() == [2**k - 1]
    queue.release()
