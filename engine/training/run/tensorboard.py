"""TensorBoard curves and images of training events; needs the extra ``tensorboard``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyvips

from engine.errors import UsageError, option
from engine.training.run.events import Event, IterationDone, ScaleFinished, Validated


def writer(folder: Path) -> Callable[[Event], None]:
    """A callback that writes events below ``folder``. Raises UsageError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            f"{option('tensorboard')}: TensorBoard is not installed; run pip install 'ourgan-engine[tensorboard]'"
        ) from None
    board: Any = SummaryWriter(str(folder))

    def write(event: Event) -> None:
        match event:
            case IterationDone():
                prefix = f"phase {event.phase}/" if event.phases > 1 else ""
                for name, value in event.losses.items():
                    board.add_scalar(f"{prefix}loss/{name}", value, event.iteration)
            case Validated():
                for measure, values in (("PSNR", event.psnr), ("texture distance", event.texture)):
                    for name, value in values.items():
                        board.add_scalar(f"{measure}/{name}", value, event.iteration)
                board.add_image("samples", _read_pixels(event.sample), event.iteration, dataformats="HWC")
            case ScaleFinished():
                board.add_image(f"phase {event.scale}/samples", _read_pixels(event.sample), dataformats="HWC")
            case _:
                return
        board.flush()

    return write


def _read_pixels(path: Path) -> np.ndarray:
    return np.asarray(pyvips.Image.new_from_file(str(path)).numpy())
