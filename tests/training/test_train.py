"""One photograph in, a model file out; a stopped run continues anywhere."""

import json

import pytest
from PIL import Image
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.errors import InputError, Interrupted, ResumeError, UsageError
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
    assert record["preset"]["structure"]["iterations"] == [3, 2, 2]
    assert record["preset"]["sr"]["crop"] == 32
    with pytest.raises(ResumeError, match="holds another run"):
        run(large_photo, out, request_())
    with pytest.raises(ResumeError, match="seed = 0, not 1"):
        run(large_photo, out, request_(seed=1), resume=True)
    with pytest.raises(ResumeError, match="photo = "):
        run(photo, out, request_(), resume=True)
