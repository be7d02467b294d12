"""The devices that exist now, and which of them a name means."""

import torch

MIB = 1 << 20
GIB = 1 << 30

TYPE = "pretend"
"""Type of the device: PyTorch's private one, under this name."""

boards = []
"""The ``Accelerator`` of every block of ``pretend_accelerator`` that is open, the innermost last."""


class AcceleratorError(AssertionError):
    """Use of the device that CUDA would refuse, or that would give other pixels now and then."""


def active():
    """The innermost ``Accelerator``."""
    return boards[-1]


def index_of(device=None):
    """Index of a device; the current one for None and for a device without an index."""
    if device is None:
        return active().current
    if not isinstance(device, int):
        device = torch.device(device)
        if device.type != TYPE:
            raise ValueError(f"Expected a {TYPE} device, but got: {device}")
        device = active().current if device.index is None else device.index
    if device >= len(active().memory):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device


def strict_index(device=None):
    """For functions that refuse a device without an index."""
    if device is not None and not isinstance(device, int) and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
    return index_of(device)
