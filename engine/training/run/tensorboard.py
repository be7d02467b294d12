"""Training events as TensorBoard curves and pictures, where its package is installed (the extra `tensorboard`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyvips

from engine.errors import UsageError
from engine.training.run.events import Event, IterationDone, Reviewed, ScaleFinished


def writer(folder: Path) -> Callable[[Event], None]:
    """What takes events and writes them below `folder`. Raises UsageError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard: not installed; pip install 'ourgan-engine[tensorboard]'") from None
    board: Any = SummaryWriter(str(folder))

    def write(event: Event) -> None:
        match event:
            case IterationDone():
                place = f"phase {event.phase}/" if event.phases > 1 else ""
                for name, value in event.losses.items():
                    board.add_scalar(f"{place}loss/{name}", value, event.iteration)
            case Reviewed():
                for name, values in (("PSNR", event.psnr), ("texture distance", event.texture)):
                    for which, value in values.items():
                        board.add_scalar(f"{name}/{which}", value, event.iteration)
                board.add_image("samples", _pixels(event.sample), event.iteration, dataformats="HWC")
            case ScaleFinished():
                board.add_image(f"phase {event.scale}/samples", _pixels(event.sample), dataformats="HWC")
            case _:
                return
        board.flush()

    return write


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(pyvips.Image.new_from_file(str(path)).numpy())
