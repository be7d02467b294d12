"""Distillation: a small network learns from a large one."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.errors import InputError, Interrupted, UsageError
from engine.model.checkpoints import read_provenance
from engine.training.preset import read_preset
from engine.training.run.events import IterationDone, Prepared, Validated
from engine.training.sr.distil import Request, distil
from engine.training.sr.networks import Shape
from engine.training.sr.train import Runtime


@pytest.fixture
def small():
    return read_preset("distil").sr.replace(
        iterations=80, batch=4, crop=32, milestones=(60,), learning_rate=2e-3, ema=0.8, checkpoint_every=40,
        held_out=0.25, discriminator_channels=8,
    )  # fmt: skip


@pytest.fixture
def teacher(tmp_path, small_rrdb):
    save_file(small_rrdb.state_dict(), tmp_path / "teacher.safetensors")
    return str(tmp_path / "teacher.safetensors")


def run(photos, out, request, **runtime):
    events = []
    distil(photos, out, request, Runtime(on_event=events.append, **runtime))
    return events


def test_student_approaches_teacher(large_photo, small, teacher, tmp_path):
    out = tmp_path / "student.safetensors"
    request = Request(recipe=small, teacher=teacher, start=teacher, shape=Shape(blocks=1), precision="fp32")
    events = run([large_photo], out, request)
    *_, last = [e for e in events if isinstance(e, Validated)]
    assert last.held_out
    assert last.psnr["now"] > last.psnr["start"] + 1.5
    assert events[1] == Prepared("photographs", {"number": 1, "megapixels": 0.0192})
    assert {key.split(".")[1] for key in load_file(out) if key.startswith("body.")} == {"0"}
    facts = read_provenance(out)
    assert "distilled from teacher.safetensors" in facts["source"]
    assert facts["sigma"] == 0


def test_teacher_as_student_has_no_error(large_photo, small, teacher, tmp_path):
    request = Request(recipe=small.replace(iterations=1), teacher=teacher, start=teacher, precision="fp32")
    events = run([large_photo], tmp_path / "same.safetensors", request)
    assert (
        next(e for e in events if isinstance(e, IterationDone)).losses["pixel"] < 1e-2
    )  # the student's output is not clamped
    assert next(e for e in events if isinstance(e, Validated)).psnr["start"] == pytest.approx(100)


def test_folders_and_resume(large_photo, small, teacher, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    for name in ("b.png", "a.JPG"):
        with Image.open(large_photo) as image:
            image.convert("RGB").save(folder / name)
    recipe = small.replace(iterations=4, checkpoint_every=2)
    request = Request(
        recipe=recipe, teacher=teacher, start="scratch", shape=Shape(channels=8, blocks=1), precision="fp32"
    )
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run([folder, large_photo], whole, request)[1].values["number"] == 3

    def stop(event):
        if isinstance(event, IterationDone) and event.iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        distil([folder, large_photo], cut, request, Runtime(on_event=stop))
    run([folder, large_photo], cut, request, resume=True)
    assert all(torch.equal(load_file(cut)[name], tensor) for name, tensor in load_file(whole).items())
    assert not list(tmp_path.glob("*.photo*"))


def test_teacher_with_noise_channels_is_refused(large_photo, small, small_noisy_rrdb, tmp_path):
    save_file(small_noisy_rrdb.state_dict(), tmp_path / "noisy.safetensors")
    request = Request(recipe=small, teacher=str(tmp_path / "noisy.safetensors"))
    with pytest.raises(UsageError, match="noisy.safetensors: has 5 noise channels"):
        run([large_photo], tmp_path / "x.safetensors", request)


def test_refusals(large_photo, small, teacher, tmp_path):
    request = Request(recipe=small, teacher=teacher, start=teacher)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no photograph in this folder"):
        run([tmp_path / "empty"], tmp_path / "x.safetensors", request)
    with pytest.raises(UsageError, match="name files or folders"):
        run([], tmp_path / "x.safetensors", request)
    for name in ("texture", "detail", "feature_texture", "checkerboard"):
        with pytest.raises(UsageError, match=f"^{name} = 1: a distillation"):
            Request(recipe=small.replace(**{name: 1.0}))
    Image.new("RGB", (40, 40)).save(tmp_path / "tiny.png")
    with pytest.raises(InputError, match="a photograph: 30x40"):
        run([tmp_path / "tiny.png"], tmp_path / "x.safetensors", request)
