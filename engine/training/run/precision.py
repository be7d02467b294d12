"""In which precision a training run computes: the name that a user gives, torch's dtype, the autocast context."""

from typing import cast

import torch
from torch import Tensor

from engine.device.precision import Precision as Precision
from engine.errors import UsageError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def known_precision(name: str) -> Precision:
    """The name, checked; raises UsageError."""
    if name not in ("bf16", "fp16", "fp32"):
        raise UsageError(f"precision {name!r} is unknown: choose bf16, fp16 or fp32")
    return cast(Precision, name)


def known_device(name: str) -> torch.device:
    """The device, tried out; raises UsageError."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {first}") from None
    return device


def autocast(device: torch.device, precision: Precision, enabled: bool = True) -> torch.autocast:
    """Half precision for what may run in it; a context that does nothing for fp32."""
    half = HALF.get(precision)
    return torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=enabled and half is not None)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
