"""TensorBoard reads the written curves and images, if it is installed."""

import pytest
import torch

from engine.training.photo import write_row
from engine.training.run.events import CheckpointSaved, IterationDone, ScaleFinished, Validated


@pytest.mark.filterwarnings("ignore")
def test_curves_and_images(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from engine.training.run.tensorboard import writer

    sample, folder = tmp_path / "row.png", tmp_path / "board"
    write_row([torch.rand(3, 4, 5)], sample)
    write = writer(folder)
    write(IterationDone(0, 1, 3, 9, {"pixel": 0.25}, 0.1, 1.0))
    write(IterationDone(2, 10, 3, 9, {"rec": 0.5}, 0.1, 1.0))
    write(Validated(3, True, {"now": 30.0}, {"now": 0.01}, sample))
    write(ScaleFinished(2, 10, 1.0, sample))
    write(CheckpointSaved(0, 3, tmp_path))
    board = EventAccumulator(str(folder)).Reload()
    assert board.Scalars("loss/pixel")[0].value == 0.25
    assert board.Scalars("phase 2/loss/rec")[0].step == 3
    assert board.Scalars("PSNR/now")[0].value == 30
    assert board.Images("samples")[0].width == 5
