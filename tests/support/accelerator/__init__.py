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

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from engine.device import memory as device_memory
from engine.device import runtime
from support.accelerator.active import GIB, MIB, TYPE, AcceleratorError, boards
from support.accelerator.cuda import methods_of_storages
from support.accelerator.operations import Accelerator

__all__ = ["GIB", "MIB", "TYPE", "Accelerator", "AcceleratorError", "pretend_accelerator"]


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
    boards.append(board)
    with ExitStack() as stack:
        stack.callback(boards.pop)
        board.start()
        # The threads that compute gradients know one device.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(mock.patch.object(runtime, "DEFAULT_TYPE", TYPE))
        stack.enter_context(mock.patch.dict(device_memory._contexts, clear=True))
        for name, method in methods_of_storages().items():
            stack.enter_context(mock.patch.object(torch.UntypedStorage, name, method, create=True))
        stack.enter_context(board)
        yield board
        for index in range(devices):
            board.synchronize(index)
    if board.problems:
        raise AcceleratorError("; ".join(sorted(set(board.problems))))
