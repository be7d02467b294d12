"""Choice of the device and its precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.device import runtime
from engine.device.memory import open_device
from engine.device.precision import Precision
from engine.errors import UsageError, option

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name of a precision -> its dtype."""


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the default: CUDA where it is available, else the CPU. Accelerators have an index.

    Raises:
        UsageError: the name is unknown, or a tensor cannot be made on the device and copied to the host.
    """
    try:
        device = _named(name)
        open_device(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this device
        if name is None:
            problem = str(error).splitlines()[0]
            raise UsageError(f"GPU: does not answer ({problem}); use {option('device', 'cpu')}") from error
        raise UsageError(f"{option('device', name)}: {_absence(name)}; use {' or '.join(usable_devices())}") from error
    return device


def _named(name: str | None) -> torch.device:
    if name is None:
        return runtime.default_device() or torch.device("cpu")
    device = torch.device(name)
    return device if device.type == "cpu" or device.index is not None else runtime.current_device(device.type)


def usable_devices() -> list[str]:
    """Names of the devices of this machine that this PyTorch can use."""
    return ["cpu", *runtime.device_names()]


def _absence(name: str) -> str:
    """Reason that a device cannot be used, in words: those of PyTorch are a page long."""
    if name.partition(":")[0] == "cuda" and not runtime.is_built_with_cuda():
        return "not available, this PyTorch is built without CUDA"
    return "not a device of this machine"


def fast_half(device: torch.device) -> Precision | None:
    """Half precision that the device computes much faster than float32; None if there is none."""
    if device.type != "cpu":
        return "fp16"
    # PyTorch emulates bf16, slowly, on a CPU without these instructions. The tests are private names of torch.cpu.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(test is not None and test() for test in tests) else None


def check_half(names: Iterable[str], device: torch.device) -> None:
    """Refuse bf16 where the device only emulates it: its libraries then find no algorithm in the middle of a render.

    Raises:
        UsageError: a name is ``bf16``, which the device does not compute with.
    """
    if "bf16" in names and not runtime.computes_bf16(device):
        name = runtime.hardware_name(device) or str(device)
        raise UsageError(f"{option('precision', 'bf16')}: {name} has no instructions for it; use fp16 or fp32")


def is_precision(text: object, stages: int) -> bool:
    """Whether a stored text names a precision for a chain of ``stages``: one name, or one for each with commas."""
    names = str(text).split(",")
    return len(names) in (1, stages) and all(name in PRECISIONS for name in names)


def check_precisions(names: Sequence[str], stages: int) -> None:
    """Check the precisions of a chain of stages.

    Raises:
        UsageError: a name is unknown, or there is not one name for each of the ``stages``.
    """
    if len(names) == stages and all(name in PRECISIONS for name in names):
        return
    problem = "unknown" if len(names) == stages else f"{len(names)} for {stages} step{'s' if stages > 1 else ''}"
    value = names[0] if problem == "unknown" and len(set(names)) == 1 else ",".join(names)
    advice = f"auto, one of {', '.join(PRECISIONS)}" + (f", or {stages} of them with commas" if stages > 1 else "")
    raise UsageError(f"{option('precision', value)}: {problem}; use {advice}")
