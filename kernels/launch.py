"""launch: Triton if it is installed, and the choice between a kernel and its definition; shared by all kernel files.

The convention of all files: ``<op>`` takes the arguments of its definition ``<op>_torch`` and the keyword ``use_triton``.
None (the default) lets the device decide, True forces the kernel (CPU tensors then run in Triton's interpreter), False
takes the definition.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.device.runtime import activate, device_module

__all__ = [
    "HALF",
    "block_and_grid",
    "column_blocks",
    "is_hopper",
    "is_interpreting",
    "jit",
    "launch",
    "observed_launches",
    "tl",
    "triton",
    "use_kernel",
]

HALF = (torch.float16, torch.bfloat16)
"""Dtypes with matrix instructions; products of float32 stay with PyTorch's libraries."""

# Importing Triton costs 0.4 s and 80 MB, in vain on a CPU build of torch. There, setting the variable asks for it: 1 for
# the interpreter, 0 to compile ahead of time.
_ENABLED = torch.version.cuda is not None or "TRITON_INTERPRET" in os.environ
_AVAILABLE = _ENABLED and importlib.util.find_spec("triton") is not None

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = importlib.import_module("triton") if _AVAILABLE else None
    tl = importlib.import_module("triton.language") if _AVAILABLE else None

# Triton decides once, when a kernel is defined.
_INTERPRETING = triton is not None and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

Observer = Callable[[str, list[torch.Tensor], dict[str, Any]], None]
"""Called with the name of a kernel, its tensors and its options."""

_observers: list[Observer] = []

_OLDEST = (8, 0)  # compute capability that Triton supports and that has bfloat16
_INTERPRETED_ELEMENTS = 65536  # the interpreter takes 3.5 ms for each program, whatever its size


def jit(*, do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator ``@jit()``: ``triton.jit``, or the function itself without Triton.

    A kernel's arguments are annotated ``tl.tensor`` (addresses and numbers) or ``tl.constexpr``.

    Args:
        do_not_specialize: numbers that differ from launch to launch, for whose divisibility nothing is compiled again.
    """
    if triton is None:
        return lambda function: function
    return functools.partial(triton.jit, do_not_specialize=list(do_not_specialize))


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    return _INTERPRETING


@functools.cache
def _can_compile_for(device: torch.device) -> bool:
    if triton is None or device.type != "cuda" or device_module(device).get_device_capability(device) < _OLDEST:
        return False
    # Triton builds a stub around every kernel with the system's compiler and Python's header, which many desktops lack.
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    return has_compiler and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def is_hopper(device: torch.device) -> bool:
    """Whether a device has compute capability 9.0, whose matrix instructions read their operands from shared memory."""
    return device.type == "cuda" and device_module(device).get_device_capability(device) == (9, 0)


def use_kernel(device: torch.device, use_triton: bool | None) -> bool:
    """Whether an operation on tensors of ``device`` takes its kernel; otherwise it takes its definition.

    Raises RuntimeError for ``use_triton=True`` where the kernel cannot run.
    """
    if device.type == "meta":
        return use_triton is not False and _observers != []
    if use_triton is None:
        return _can_compile_for(device) and not is_interpreting()
    if use_triton and not (is_interpreting() or _can_compile_for(device)):
        raise RuntimeError(
            f"no Triton kernel for {device}: a GPU needs triton and compute capability {_OLDEST[0]}.{_OLDEST[1]}, "
            "a CPU needs TRITON_INTERPRET=1 set before engine.kernels is imported; or leave out use_triton"
        )
    return use_triton


def block_and_grid(
    height: int, width: int, gpu_block: tuple[int, int] = (4, 256)
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Blocks that cover [height, width].

    Returns:
        (rows, columns) of a block, powers of two: ``gpu_block``, or a large one in the interpreter.
        (columns, rows) of the grid of blocks.
    """
    if is_interpreting():
        columns = min(256, _power_of_two(width))
        block = min(_INTERPRETED_ELEMENTS // columns, _power_of_two(height)), columns
    else:
        block = gpu_block
    return block, (-(-width // block[1]), -(-height // block[0]))


def column_blocks(columns: int) -> tuple[int, int]:
    """Two blocks, powers of two of at least 16, that cover ``columns``; the second is 0 where one is enough.

    Channels are often 3 or 5 times a power of two: one block would compute up to half of its columns in vain.
    """
    block = max(16, 1 << (columns.bit_length() - 1))
    return block, max(16, _power_of_two(columns - block)) if columns > block else 0


def _power_of_two(size: int) -> int:
    """Smallest power of two that is at least ``size``, and at least 2."""
    return 1 << max(1, (size - 1).bit_length())


@contextlib.contextmanager
def observed_launches(observer: Observer) -> Iterator[None]:
    """On the meta device, take kernels inside a ``with`` block and tell ``observer`` of each launch: nothing runs there."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:  # noqa: ANN401
    """``kernel[grid](*arguments, **options)`` on the device of its first tensor, which need not be the current one."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    device = tensors[0].device
    if device.type == "meta":
        for observer in _observers:
            observer(kernel.__name__, tensors, options)
        return
    with activate(device):
        kernel[grid](*arguments, **options)
