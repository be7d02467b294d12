"""Precision of a training run: torch's dtype and the autocast context."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from engine.device.precision import Precision
from engine.errors import UsageError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(name: str) -> None:
    """Raise UsageError unless ``name`` is a ``Precision``."""
    if name not in get_args(Precision):
        raise UsageError(f"precision = {name!r}: unknown; use one of {', '.join(get_args(Precision))}")


def autocast(device: torch.device, precision: Precision, *, enabled: bool = True) -> torch.autocast:
    """Half precision for the operations that tolerate it; for fp32 a context without effect."""
    half = HALF.get(precision)
    return torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=enabled and half is not None)


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32, or unchanged in fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
