"""Accelerators as PyTorch shows them: the only module of the engine that asks ``torch.cuda`` and its siblings.

Every type of device has a module of PyTorch, with functions of the same names: ``torch.cuda`` (NVIDIA, and AMD by ROCm),
``torch.xpu``, ``torch.mps``. What a device can do is asked of its module. So another module with the names of ``torch.cuda`` can
stand in for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    """PyTorch's module for a device with memory of its own; None for CPU and MPS, which use the host's."""
    module = device_module(device)
    return module if hasattr(module, "mem_get_info") else None


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


@contextmanager
def activate(device: torch.device) -> Iterator[None]:
    """Make a device the current one of its type."""
    module = device_module(device)
    with module.device(device) if hasattr(module, "mem_get_info") else nullcontext():
        yield
