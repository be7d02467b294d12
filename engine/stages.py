"""A stage at work: one network on one device in one precision. Takes a float32 tile, returns the network's output.

Knows nothing of images, grids or files: engine.lazy decides what a tile is.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from engine.archs import Upscaler
from engine.errors import UsageError
from engine.memory import network_heap

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


class Stage:
    """A network moved to ``device`` and cast to ``precision`` (mixed: the first and last convolution and the residual
    stream stay float32).
    """

    def __init__(self, network: Upscaler, device: torch.device, precision: str) -> None:
        if precision not in PRECISIONS:
            raise UsageError(f"--precision {precision}: use one of {', '.join(PRECISIONS)}")
        self.scale = network.scale
        self.align = network.align
        self.radius = network.radius
        self.device = device
        if precision != "fp32":
            network.to_mixed(PRECISIONS[precision])
        self.network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def run(self, tile: Tensor) -> Tensor:
        """``tile`` float32 [1, 3, h, w], channels-last, on the stage's device. Returns [1, 3, h * scale, w * scale]."""
        try:
            with network_heap():
                return cast(Tensor, self.network(tile))
        except RuntimeError as error:
            # torch has a class for an accelerator's memory and only words for the host's.
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise MemoryError(str(error).splitlines()[0]) from error
            raise
