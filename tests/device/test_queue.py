"""Devices: errors of memory by their class, a queue that does things in order, what a driver's list of processes says."""

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

LISTED = """GPU:0
process       1234 uses      512.500 MB GPU memory
process      12345 uses    20480.000 MB GPU memory"""
"""As torch.cuda.list_gpu_processes writes it."""


def test_a_process_is_found_by_its_whole_number():
    assert process_bytes(LISTED, 12345) == 20480 << 20
    assert process_bytes(LISTED, 1234) == 512.5 * (1 << 20)
    assert process_bytes(LISTED, 123) is None
    assert process_bytes("pynvml module not found, please install nvidia-ml-py", 1) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nSee documentation"), OutOfDeviceMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes."), MemoryError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_memory_that_is_used_up_is_a_memory_error(error, kind):
    with pytest.raises((MemoryError, RuntimeError)) as caught, memory_errors():
        raise error
    assert type(caught.value) is kind
    assert str(caught.value) == str(error).splitlines()[0]


@pytest.mark.parametrize("before", [True, False])
def test_float32_is_float32_inside_and_what_it_was_after(before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    inside = []

    def fail():
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


def test_a_queue_does_things_in_order():
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
def test_a_recorded_launch_is_repeated_and_copies_wait_for_it():
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
