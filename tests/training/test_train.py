"""One photograph in, a model file out; a stopped run continues anywhere."""

import dataclasses
import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.errors import BudgetError, InputError, Interrupted, ModelError, ResumeError, UsageError
from engine.model.build import build
from engine.model.bundle import load
from engine.training.preset import Preset, read_preset
from engine.training.run.events import IterationDone, ScaleStarted, TrainingStarted
from engine.training.run.runtime import Runtime
from engine.training.train import ModelRequest, train_model

pytestmark = pytest.mark.usefixtures("narrow_structure")


@pytest.fixture
def request_(recipe, structure_request, start_file):
    """Factory of requests; keywords change the request."""
    structure = structure_request(
        iterations=(3, 2, 2), padding="reflect", vae_texture=5.0, vae_coherence=5.0, texture=5.0, detail=1.0, sigma=0.1,
        checkpoint_every=2,
    ).recipe  # fmt: skip
    preset = Preset(recipe.replace(iterations=3), structure, {"step3": recipe.replace(iterations=2)})
    return lambda **changes: ModelRequest(**{"preset": preset, "start": str(start_file), "precision": "fp32"} | changes)


def run(photo, out, request, resume=False, on_event=lambda event: None):
    lines = []
    train_model(photo, out, request, Runtime(resume=resume, on_event=on_event, log=lines.append))
    return lines


def test_model_of_all_steps(large_photo, request_, tmp_path):
    out = tmp_path / "model.safetensors"
    events = []
    lines = run(large_photo, out, request_(licence="CC0-1.0"), on_event=events.append)
    begun = {event.name: event.total for event in events if isinstance(event, TrainingStarted)}
    model = load(out)
    assert model.base_size == (24, 32)
    assert [stage.sigma for stage in model.stages] == [0.03, 0.03, 0.03]
    # 160 pixels are more than the output of step 2 and less than that of step 3: two sets of weights.
    assert [stage.weights for stage in model.stages] == ["sr0", "sr1", "sr1"]
    assert any("step 4 shares the weights of step 3" in line for line in lines)
    assert begun == {"step 2": 3, "step 3": 2}
    left = {p.name for p in (tmp_path / "model.training").iterdir()}
    assert {"structure.safetensors", "step2.safetensors", "step3.safetensors", "run.json"} <= left
    assert not [name for name in left if name.endswith((".checkpoint", ".chain", ".photo", ".part"))]
    assert model.manifest.structure["licence"] == "CC0-1.0"


def test_start_from_a_model(large_photo, request_, tmp_path):
    for blocks in (1, 3):
        network = RRDBNet(channels=8, blocks=blocks, growth=4)
        save_file(network.state_dict(), tmp_path / f"{blocks}.safetensors")
    start, out = tmp_path / "start.safetensors", tmp_path / "model.safetensors"
    build(None, [str(tmp_path / f"{blocks}.safetensors") for blocks in (3, 1, 1)]).save(start)
    run(large_photo, out, request_(start=str(start)))
    assert [len(load(out).network(step).body) for step in range(3)] == [3, 1, 1]


def test_small_photograph_trains_one_network(photo, request_, tmp_path):
    out = tmp_path / "model.safetensors"
    with Image.open(photo) as image:
        image.resize((120, 90)).save(photo)
    run(photo, out, request_())
    assert {stage.weights for stage in load(out).stages} == {"sr0"}


def stop_in(part, iteration, phase=0):
    """Callback that interrupts a part of the run after an iteration."""
    current = []

    def on_event(event):
        if isinstance(event, ScaleStarted | TrainingStarted):
            current[:] = [getattr(event, "name", "step 1")]
        if isinstance(event, IterationDone) and (current, event.phase, event.iteration) == ([part], phase, iteration):
            raise KeyboardInterrupt

    return on_event


@pytest.mark.slow
def test_resumed_equals_uninterrupted(large_photo, request_, tmp_path):
    run(large_photo, tmp_path / "whole.safetensors", request_())
    stops = {"step 1": stop_in("step 1", 1, 1), "step 2": stop_in("step 2", 2), "step 3": stop_in("step 3", 1)}
    for name, on_event in stops.items():
        out = tmp_path / f"{name}.safetensors"
        with pytest.raises(Interrupted):
            run(large_photo, out, request_(), on_event=on_event)
        assert not out.exists()
        run(large_photo, out, request_(), resume=True)
        assert load(out).digest == load(tmp_path / "whole.safetensors").digest, name


def test_finished_steps_are_skipped(large_photo, request_, tmp_path):
    out = tmp_path / "model.safetensors"
    run(large_photo, out, request_())
    out.unlink()
    events = []
    run(large_photo, out, request_(), resume=True, on_event=events.append)
    assert events == []
    assert load(out).stages


def test_refusals(large_photo, photo, request_, tmp_path):
    out = tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match="use a name that ends in .safetensors"):
        run(large_photo, tmp_path / "model.pth", request_())
    with pytest.raises(InputError, match="no such folder"):
        run(large_photo, tmp_path / "none" / "model.safetensors", request_())
    with pytest.raises(UsageError, match=r"no table \[structure\]"):
        ModelRequest(preset=read_preset("distil"))
    stranger = tmp_path / "model.training" / "notes.txt"
    stranger.parent.mkdir()
    stranger.touch()
    with pytest.raises(ResumeError, match="holds no run to resume"):
        run(large_photo, out, request_(), resume=True)
    stranger.unlink()
    run(large_photo, out, request_(), resume=True)
    record = json.loads((tmp_path / "model.training" / "run.json").read_text())
    assert record.keys() == {"step 1", "step 2", "step 3"}
    assert record["step 1"]["recipe"]["iterations"] == [3, 2, 2]
    assert record["step 3"]["recipe"]["iterations"] == 2
    with pytest.raises(ResumeError, match="holds another run"):
        run(large_photo, out, request_())
    with pytest.raises(
        ResumeError, match="step 1 has begun with seed = 0, not 1; use its value again, or delete struct"
    ):
        run(large_photo, out, request_(seed=1), resume=True)
    with Image.open(large_photo) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(large_photo)
    with pytest.raises(ResumeError, match="photo = "):
        run(large_photo, out, request_(), resume=True)


def test_what_cannot_run_is_refused_before_anything_is_written(
    large_photo, request_, recipe, vgg_file, tmp_path, monkeypatch
):
    out, garbage = tmp_path / "model.safetensors", tmp_path / "garbage.pth"
    garbage.write_text("no weights")
    preset = request_().preset
    large_step_3 = dataclasses.replace(preset, steps={"step3": recipe.replace(batch=400, crop=64)})
    with_vgg = dataclasses.replace(preset, sr=recipe.replace(perceptual=1.0, perceptual_layers="forms"))
    for changes, runtime, error, message in (
        ({"start": "nothing"}, {}, ModelError, "nothing: no such weights; use realsr, x4plus, scratch"),
        ({}, {"budget": 1000}, BudgetError, "step 1: an iteration takes about .* allow more by memory"),
        (
            {"preset": large_step_3},
            {"budget": 100 << 20},
            BudgetError,
            "step 3: an iteration .* smaller batch than 400",
        ),
        ({"preset": with_vgg, "vgg": garbage}, {}, InputError, "garbage.pth: damaged"),
        ({"preset": with_vgg, "vgg": tmp_path / "none.pth"}, {}, InputError, "none.pth: "),
        ({"preset": dataclasses.replace(preset, sr=recipe.replace(crop=128))}, {}, InputError, "smaller than a crop"),
    ):
        files = set(tmp_path.iterdir())
        with pytest.raises(error, match=message) as caught:
            train_model(large_photo, out, request_(**changes), Runtime(**runtime))
        assert "\n" not in str(caught.value)
        assert set(tmp_path.iterdir()) == files, message
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(BudgetError, match=r"a training takes about .* GiB of disk \(0.00 GiB are free\); make room"):
        run(large_photo, out, request_())
    assert not out.with_suffix(".training").exists()


def test_steps_that_have_not_begun_take_other_settings(large_photo, request_, recipe, start_file, vgg_file, tmp_path):
    out, preset = tmp_path / "model.safetensors", request_().preset
    with pytest.raises(Interrupted):
        run(large_photo, out, request_(), on_event=stop_in("step 1", 1, 1))
    other_start = start_file.rename(tmp_path / "corrected.safetensors")
    changed = Preset(recipe.replace(iterations=2, perceptual=0.1, perceptual_layers="forms"), preset.structure)
    changes = {"start": str(other_start), "preset": changed, "vgg": vgg_file}
    with pytest.raises(Interrupted):
        run(large_photo, out, request_(**changes), resume=True, on_event=stop_in("step 2", 1))
    assert (tmp_path / "model.training" / "structure.safetensors").exists()
    for wrong, message in (
        ({"preset": dataclasses.replace(changed, sr=changed.sr.replace(iterations=5))}, "recipe.iterations = 2, not 5"),
        ({"start": "realsr"}, "step 2 has begun with start = '.*corrected.safetensors', not 'realsr'"),
        ({"vgg": other_start}, "step 2 has begun with vgg = "),
        ({"preset": dataclasses.replace(changed, structure=preset.structure.replace(ema=0.5))}, "step 1 .* recipe.ema"),
    ):
        with pytest.raises(ResumeError, match=f"{message}.*; use its value again, or delete .* to train step . again"):
            run(large_photo, out, request_(**changes | wrong), resume=True)
    events = []
    run(large_photo, out, request_(**changes), resume=True, on_event=events.append)
    assert [part.name for part in events[0].parts] == ["step 2", "step 3"]
    assert events[0].parts[0].position == (0, 1)
    assert load(out).stages


def test_forecast_covers_every_step(large_photo, request_, tmp_path):
    events = []
    run(large_photo, tmp_path / "model.safetensors", request_(), on_event=events.append)
    parts = events[0].parts
    assert [(part.name, part.iterations) for part in parts] == [
        ("step 1", (3, 2, 2)),
        ("step 2", (3,)),
        ("step 3", (2,)),
    ]
    assert all(min(part.seconds) > 0 for part in parts)
    assert [part.preparation > 0 for part in parts] == [False, True, True]
    assert all(part.total == pytest.approx(part.preparation + part.left(0, 0)) for part in parts)
