"""Choice of the device and of the precision that it computes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.errors import UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """The named device, or the first of CUDA and CPU that exists."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not usable here ({reason}); use cpu, or leave it out") from error
    return device


def fast_half(device: torch.device) -> str | None:
    """The half precision that this device computes much faster than float32, if any."""
    if device.type != "cpu":
        return "fp16"
    # PyTorch emulates bf16 on a CPU that lacks it, slowly.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(test is not None and test() for test in tests) else None


def check_precisions(names: Sequence[str], stages: int) -> None:
    """Raise UsageError unless there is a known precision for every stage."""
    if len(names) != stages or any(name not in PRECISIONS for name in names):
        raise UsageError(
            f"--precision {','.join(dict.fromkeys(names))}: use auto, one of {', '.join(PRECISIONS)}, "
            f"or {stages} of them with commas"
        )
