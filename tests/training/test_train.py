"""One photograph in, a model file out; stopped anywhere, it goes on."""

import json

import pytest
from PIL import Image
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import Config
from engine.errors import InputError, Interrupted, ResumeError, UsageError
from engine.model.build import build
from engine.model.bundle import load
from engine.training import train as whole
from engine.training.preset import Preset, read_preset
from engine.training.run.events import IterationDone, ScaleStarted, TrainingStarted
from engine.training.sr.train import Runtime
from engine.training.structure import train as structure_run
from engine.training.structure.recipe import StructureRecipe
from engine.training.train import Request, train_model


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Step 1 of three small scales that end at 32 pixels, so that steps end at 128, 512 and 2048."""
    train = structure_run.train_structure
    config = Config(last=2, last_vae=1, channels=8, latent=6, layers=1)

    def small(photo, out, **options):
        return train(photo, out, **options | {"config": config, "base_width": 32, "least_width": 12})

    monkeypatch.setattr(whole, "train_structure", small)
    for module in ("whole", "sr.run"):
        monkeypatch.setattr(f"engine.training.{module}.BASE_WIDTH", 32)


@pytest.fixture
def request_(recipe, start_file):
    structure = StructureRecipe(
        iterations=(3, 2, 2), batch=1, padding="reflect", coordinates=True, last_vae=1, vae_texture=5.0, vae_coherence=5.0,
        texture=5.0, detail=1.0, feature_texture=0.0, adversarial=1.0, discriminator="wgan", sigma=0.1, ema=0.9, checkpoint_every=2
    )  # fmt: skip
    preset = Preset(recipe.replace(iterations=3), structure, {"step3": recipe.replace(iterations=2)})
    return lambda **changes: Request(**{"preset": preset, "start": str(start_file), "precision": "fp32"} | changes)


def run(photo, out, request, resume=False, on_event=lambda event: None):
    lines = []
    train_model(photo, out, request, Runtime(resume=resume, on_event=on_event, log=lines.append))
    return lines


def test_everything_is_trained_and_bundled(large_photo, request_, tmp_path):
    out = tmp_path / "model.safetensors"
    events = []
    lines = run(large_photo, out, request_(licence="CC0-1.0"), on_event=events.append)
    begun = {event.name: event.total for event in events if isinstance(event, TrainingStarted)}
    model = load(out)
    assert model.base_size == (24, 32)
    assert [stage.sigma for stage in model.stages] == [0.03, 0.03, 0.03]
    # 160 pixels are more than step 2 makes, and not more than step 3 makes: two sets of weights.
    assert [stage.weights for stage in model.stages] == ["sr0", "sr1", "sr1"]
    assert any("step 4 shares the weights of step 3" in line for line in lines)
    assert begun == {"step 2": 3, "step 3": 2}
    left = {p.name for p in (tmp_path / "model.training").iterdir()}
    assert {"structure.safetensors", "step2.safetensors", "step3.safetensors", "run.json"} <= left
    assert not [name for name in left if name.endswith((".checkpoint", ".chain", ".photo", ".part"))]
    assert model.manifest.structure["licence"] == "CC0-1.0"


def test_a_start_may_differ_from_step_to_step(large_photo, request_, tmp_path):
    for blocks in (1, 3):
        network = RRDBNet(channels=8, blocks=blocks, growth=4)
        save_file(network.state_dict(), tmp_path / f"{blocks}.safetensors")
    start, out = tmp_path / "start.safetensors", tmp_path / "model.safetensors"
    build(None, [str(tmp_path / f"{blocks}.safetensors") for blocks in (3, 1, 1)]).save(start)
    run(large_photo, out, request_(start=str(start)))
    assert [len(load(out).network(step).body) for step in range(3)] == [3, 1, 1]


def test_a_small_photograph_teaches_one_network(photo, request_, tmp_path):
    out = tmp_path / "model.safetensors"
    with Image.open(photo) as image:
        image.resize((120, 90)).save(photo)
    run(photo, out, request_())
    assert {stage.weights for stage in load(out).stages} == {"sr0"}


@pytest.mark.parametrize("where", [("scale", 1, 1), ("step 2", 0, 2), ("step 3", 0, 1)])
def test_resumed_model_equals_uninterrupted_one(large_photo, request_, tmp_path, where):
    run(large_photo, tmp_path / "whole.safetensors", request_())
    part, phase, iteration = where
    now = []

    def stop(event):
        if isinstance(event, ScaleStarted | TrainingStarted):
            now[:] = [getattr(event, "name", "scale")]
        if isinstance(event, IterationDone) and now == [part] and (event.phase, event.iteration) == (phase, iteration):
            raise KeyboardInterrupt

    out = tmp_path / "cut.safetensors"
    with pytest.raises(Interrupted):
        run(large_photo, out, request_(), on_event=stop)
    assert not out.exists()
    run(large_photo, out, request_(), resume=True)
    assert load(out).digest == load(tmp_path / "whole.safetensors").digest


def test_finished_parts_are_not_trained_again(large_photo, request_, tmp_path):
    out = tmp_path / "model.safetensors"
    run(large_photo, out, request_())
    out.unlink()
    events = []
    run(large_photo, out, request_(), resume=True, on_event=events.append)
    assert events == []
    assert load(out).stages


def test_refusals(large_photo, photo, request_, tmp_path):
    out = tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match="ends in .safetensors"):
        run(large_photo, tmp_path / "model.pth", request_())
    with pytest.raises(InputError, match="no such folder"):
        run(large_photo, tmp_path / "none" / "model.safetensors", request_())
    with pytest.raises(UsageError, match=r"no table \[structure\]"):
        Request(preset=read_preset("distil"))
    stranger = tmp_path / "model.training" / "notes.txt"
    stranger.parent.mkdir()
    stranger.touch()
    with pytest.raises(ResumeError, match="no run to resume in this folder"):
        run(large_photo, out, request_(), resume=True)
    stranger.unlink()
    run(large_photo, out, request_(), resume=True)
    with pytest.raises(ResumeError, match="holds another run"):
        run(large_photo, out, request_())
    with pytest.raises(ResumeError, match="seed = 0, not 1"):
        run(large_photo, out, request_(seed=1), resume=True)
    with pytest.raises(ResumeError, match="photo = "):
        run(photo, out, request_(), resume=True)


def test_the_record_is_plain_json(large_photo, request_, tmp_path):
    run(large_photo, tmp_path / "model.safetensors", request_())
    record = json.loads((tmp_path / "model.training" / "run.json").read_text())
    assert record["preset"]["structure"]["iterations"] == [3, 2, 2]
    assert record["preset"]["sr"]["crop"] == 32
