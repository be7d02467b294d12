"""Accelerators as PyTorch shows them: the only module of the engine that asks ``torch.cuda`` and its siblings.

Every type of device has a module of PyTorch, with functions of the same names: ``torch.cuda`` (NVIDIA, and AMD by ROCm),
``torch.xpu``, ``torch.mps``. What a device can do is asked of its module. So another module with the names of ``torch.cuda`` can
stand in for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from typing import Any

import torch

DEFAULT_TYPE = "cuda"
"""Type of the device that is taken where the user names none, if there is one."""

OTHER_TYPES = ("mps", "xpu")
"""Types of devices that are used when the user names them."""


def device_module(device: torch.device | str) -> Any:  # noqa: ANN401 (the classes of torch.cuda have no annotations)
    """PyTorch's module for the type of a device."""
    return torch.get_device_module(device)


def memory_module(device: torch.device) -> Any:  # noqa: ANN401
    """PyTorch's module for a device with memory of its own; None for CPU and MPS, which use the host's, and for meta."""
    module = None if device.type == "meta" else device_module(device)
    return module if device.type != "cpu" and hasattr(module, "mem_get_info") else None


def is_built_with_cuda() -> bool:
    """Whether this PyTorch knows NVIDIA's or AMD's devices."""
    return torch.version.cuda is not None or torch.version.hip is not None


def default_device() -> torch.device | None:
    """The current device of the default type, with its index; None where there is none."""
    return current_device(DEFAULT_TYPE) if device_module(DEFAULT_TYPE).is_available() else None


def current_device(kind: str) -> torch.device:
    """The current device of a type, with its index: PyTorch refuses a device without one here and there."""
    module = device_module(kind)
    return torch.device(kind, module.current_device() if hasattr(module, "current_device") else 0)


def device_names() -> list[str]:
    """Names of the accelerators of this machine that this PyTorch can use."""
    count = device_module(DEFAULT_TYPE).device_count()
    return [f"{DEFAULT_TYPE}:{index}" for index in range(count)] + [
        kind for kind in OTHER_TYPES if getattr(torch, kind).is_available()
    ]


def hardware_name(device: torch.device) -> str | None:
    """Name of the hardware behind a device; None where PyTorch knows none."""
    module = device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else None


def library_versions(device: torch.device) -> list[str]:
    """Versions of the libraries that run networks on a device: cuDNN, the driver and Triton; none for a CPU."""
    if device.type == "cpu":
        return []
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    triton: str | None = None
    with suppress(metadata.PackageNotFoundError):
        triton = metadata.version("triton")
    return [f"cudnn {cudnn}", f"driver {driver}", f"triton {triton}"]


def untested(device: torch.device) -> str | None:
    """Warning for a user of an untested device; None for a tested one."""
    if device.type == "mps":
        return "mps: never tested, and its memory is not measured; give a small tile if it runs out, or the device cpu"
    if device.type == "xpu":
        return "xpu: never tested; if it fails, give the device cpu"
    return None


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16; True where PyTorch does not know."""
    module = device_module(device)
    if not hasattr(module, "is_bf16_supported"):
        return True
    with activate(device):  # it asks the current device
        return bool(module.is_bf16_supported(including_emulation=False))


def captures(device: torch.device) -> bool:
    """Whether a device has streams, events and captured launches, as CUDA has."""
    return device.type != "meta" and hasattr(device_module(device), "CUDAGraph")


@contextmanager
def activate(device: torch.device) -> Iterator[None]:
    """Make a device the current one of its type."""
    with device_module(device).device(device) if memory_module(device) is not None else nullcontext():
        yield
