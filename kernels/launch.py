"""launch: what every kernel file shares: Triton where there is one, and the choice between a kernel and its twin.

The convention of all files: ``<op>`` takes the arguments of its definition ``<op>_torch`` and the keyword ``use_triton``:
None (the default) lets the device decide, True insists on the kernel (on CPU tensors it then runs in Triton's
interpreter), False takes the twin.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

__all__ = ["area", "is_interpreting", "jit", "launch", "takes_kernel", "tl", "triton"]

# Importing Triton costs 0.4 s and 80 MB, for nothing on a CPU build of torch; whoever sets this variable asks for it,
# be it for the interpreter (1) or to compile ahead of time (0).
_WANTED = torch.version.cuda is not None or "TRITON_INTERPRET" in os.environ
_INSTALLED = _WANTED and importlib.util.find_spec("triton") is not None

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton = importlib.import_module("triton") if _INSTALLED else None
    tl = importlib.import_module("triton.language") if _INSTALLED else None

# Triton decides once, when a kernel is defined.
_INTERPRETING = triton is not None and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

_OLDEST = (8, 0)  # compute capability that Triton supports, and that has bfloat16


def jit(volatile: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator ``@jit()``: triton.jit, or the function itself where there is no Triton.

    ``volatile``: numbers that differ from launch to launch; a kernel is not compiled anew for their divisibility.
    A kernel's arguments are annotated ``tl.tensor`` (addresses and numbers) or ``tl.constexpr``.
    """
    if triton is None:
        return lambda function: function
    return functools.partial(triton.jit, do_not_specialize=list(volatile))


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    return _INTERPRETING


@functools.cache
def _is_compiled_for(device: torch.device) -> bool:
    if triton is None or device.type != "cuda" or torch.cuda.get_device_capability(device) < _OLDEST:
        return False
    # Triton builds a stub around every kernel with the system's compiler, which many desktops lack.
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def takes_kernel(device: torch.device, use_triton: bool | None) -> bool:
    """Whether a launcher takes its kernel for tensors on ``device`` (else its twin).

    Raises RuntimeError when the kernel is insisted on where it cannot run.
    """
    if use_triton is None:
        return _is_compiled_for(device) and not is_interpreting()
    if use_triton and not (is_interpreting() or _is_compiled_for(device)):
        raise RuntimeError(
            f"no Triton kernel for {device}: on a GPU this takes triton and compute capability {_OLDEST[0]}.{_OLDEST[1]}; "
            "on a CPU set TRITON_INTERPRET=1 before engine.kernels is imported, or leave use_triton out"
        )
    return use_triton


def area(height: int, width: int, on_gpu: tuple[int, int] = (4, 256)) -> tuple[tuple[int, int], tuple[int, int]]:
    """How [height, width] is cut into blocks of powers of two: ((rows, columns) of a block, blocks along (x, y))."""
    if is_interpreting():
        columns = min(256, _power_of_two(width))
        shape = min(65536 // columns, _power_of_two(height)), columns
    else:
        shape = on_gpu
    return shape, (-(-width // shape[1]), -(-height // shape[0]))


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``, and at least 2."""
    return 1 << max(1, (size - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:  # noqa: ANN401
    """``kernel[grid](*arguments, **options)`` on the device of its first tensor, which need not be the current one."""
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)
