"""Fine-tuning on a few pixels: it learns, resumes bit for bit, writes weights that others open, and refuses in one line."""

import errno
import json
import math

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from support.training import stop_after

from engine import archs
from engine.errors import BudgetError, EngineError, InputError, Interrupted, ResumeError, UsageError
from engine.io.photo import open_photo
from engine.model.bundle import open_structure
from engine.model.checkpoints import read_provenance
from engine.training.losses.discriminators import Patch
from engine.training.losses.gan import ScoreGan
from engine.training.photo import write_row
from engine.training.run.checkpoint import checkpoint_path
from engine.training.run.events import CheckpointSaved, Forecasted, IterationDone, Prepared, Validated, WeightsSaved
from engine.training.run.runtime import Runtime
from engine.training.sr.footprint import estimate
from engine.training.sr.networks import Shape
from engine.training.sr.train import SRRequest, _size, train_sr


@pytest.fixture
def request_(recipe, start_file, structure_file):
    """Factory of requests; keywords change the request."""
    return lambda **changes: SRRequest(
        **{"recipe": recipe, "start": str(start_file), "structure": structure_file, "precision": "fp32"} | changes
    )


def train(photo, out, request, **runtime):
    events = []
    on_event = runtime.pop("on_event", lambda event: None)

    def both(event):
        events.append(event)
        on_event(event)

    train_sr(photo, out, request, Runtime(on_event=both, **runtime))
    assert isinstance(events.pop(0), Forecasted)
    return events


def equal(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_file_and_events(large_photo, request_, start_file, tmp_path):
    out = tmp_path / "sr.safetensors"
    events = train(large_photo, out, request_(licence="CC0-1.0", source="a test", seed=3))
    state = load_file(out)
    assert state.keys() == load_file(start_file).keys()
    assert not torch.equal(state["conv_last.weight"], load_file(start_file)["conv_last.weight"])
    assert archs.build(state).scale == 4
    facts = read_provenance(out)
    assert (facts["licence"], facts["sigma"], facts["step"], facts["seed"]) == ("CC0-1.0; not stated", 0.03, 2, 3)
    assert "a test" in facts["source"]
    assert "start.safetensors" in facts["source"]
    assert facts["photo"]["trained_at"] == [128, 96]
    assert facts["recipe"]["crop"] == 32
    with safe_open(out, "pt") as file:
        assert file.metadata()["format"] == "pt"

    assert [type(e) for e in events[:2]] == [Prepared, Prepared]
    assert events[0].values == {"height": 96, "width": 128, "columns trained on": 96}
    assert events[1].values["pictures"] == 3
    losses = [set(e.losses) for e in events if isinstance(e, IterationDone)]
    assert losses[0] == {"pixel", "consistency", "texture", "d"}
    assert losses[-1] == {"pixel", "consistency", "texture", "adv", "d"}
    validations = [e for e in events if isinstance(e, Validated)]
    assert [e.iteration for e in validations] == [2, 4, 6]
    assert all(e.held_out and e.psnr.keys() == {"bicubic", "start", "now"} for e in validations)
    assert [e.iteration for e in events if isinstance(e, CheckpointSaved)] == [0, 2, 4]
    with Image.open(validations[0].sample) as image:
        assert image.size == (4 * 32, 4 * 32)  # four columns; three crops and a chain picture
    assert isinstance(events[-1], WeightsSaved)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("sr")) == [
        "sr-samples", "sr.safetensors", "sr.safetensors.log.jsonl",
    ]  # fmt: skip
    assert json.loads((tmp_path / "sr.safetensors.log.jsonl").read_text().splitlines()[-1])["event"] == "WeightsSaved"


def test_noise_channels(large_photo, request_, recipe, start_file, tmp_path):
    """They are trained, written and resumed, and the step above runs them."""
    request = request_(recipe=recipe.replace(noise_channels=4))
    out, same, above = (tmp_path / f"{name}.safetensors" for name in ("sr", "same", "above"))
    train(large_photo, out, request)
    assert load_file(out).keys() == {*load_file(start_file), "conv_noise.weight"}
    with pytest.raises(Interrupted):
        train(large_photo, same, request, on_event=stop_after(3))
    train(large_photo, same, request, resume=True)
    assert equal(out, same)
    train(large_photo, above, request_(step=3, previous=(out,), width=128))


def test_it_learns(large_photo, request_, recipe, tmp_path):
    recipe = recipe.replace(iterations=60, adversarial=0.0, ema=0.8, milestones=(), checkpoint_every=60)
    *_, validated, _, _ = train(large_photo, tmp_path / "sr.safetensors", request_(recipe=recipe))
    assert validated.psnr["now"] > validated.psnr["start"] + 3


@pytest.mark.parametrize(
    ("size", "trained_at"),
    [((192, 144), (128, 96)), ((86, 64), (128, 96)), ((85, 64), (85, 64))],
    ids=["larger", "smallest that is enlarged", "too small"],
)
def test_size_of_the_photograph(request_, picture, tmp_path, size, trained_at):
    """A photograph down to two thirds of the output's size is enlarged to it."""
    width, height = size
    write_row([picture(height, width)], tmp_path / "photo.png")
    structure = open_structure(request_().structure)
    assert _size(open_photo(tmp_path / "photo.png", 1), structure.base_size, request_()) == trained_at[::-1]


def test_resumed_equals_uninterrupted(large_photo, request_, tmp_path, monkeypatch):
    """The simulated inputs come from their file."""
    whole = tmp_path / "whole.safetensors"
    train(large_photo, whole, request_())
    for iteration in (1, 2, 5):
        cut = tmp_path / f"{iteration}.safetensors"
        with pytest.raises(Interrupted, match="continue with resume=True") as error:
            train(large_photo, cut, request_(), on_event=stop_after(iteration))
        assert "\n" not in str(error.value)
        assert not cut.exists()
        with monkeypatch.context() as patch:
            patch.setattr("engine.training.sr.train.simulate_inputs", None)
            train(large_photo, cut, request_(), resume=True)
        assert equal(whole, cut), iteration
        assert not cut.with_name(f"{cut.name}.chain").exists()


def test_a_log_that_fails_at_the_end(large_photo, request_, tmp_path):
    """The run is not finished before its last event is logged."""
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    train(large_photo, whole, request_())

    def fail(event):
        if isinstance(event, WeightsSaved):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        train(large_photo, cut, request_(), on_event=fail)
    train(large_photo, cut, request_(), resume=True)
    assert equal(whole, cut)
    assert not checkpoint_path(cut).exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_crash_loses_only_the_interval(large_photo, request_, tmp_path, precision):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    train(large_photo, whole, request_(precision=precision))
    with pytest.raises(RuntimeError, match="power cut"):
        train(large_photo, cut, request_(precision=precision), on_event=stop_after(5, error=RuntimeError("power cut")))
    events = train(large_photo, cut, request_(precision=precision), resume=True)
    assert [e.iteration for e in events if isinstance(e, IterationDone)] == [5, 6]
    assert equal(whole, cut)


def test_global_rng_unchanged(large_photo, request_, tmp_path):
    before = torch.get_rng_state()
    train(large_photo, tmp_path / "sr.safetensors", request_())
    assert torch.equal(before, torch.get_rng_state())


def test_validation_changes_nothing(large_photo, request_, recipe, tmp_path):
    often, never = tmp_path / "often.safetensors", tmp_path / "never.safetensors"
    train(large_photo, often, request_(recipe=recipe.replace(checkpoint_every=1)))
    train(large_photo, never, request_(recipe=recipe.replace(checkpoint_every=100)))
    assert equal(often, never)


def test_activation_checkpointing_changes_only_memory(large_photo, request_, recipe, start_file, tmp_path):
    plain, twice = tmp_path / "plain.safetensors", tmp_path / "twice.safetensors"
    network, discriminator = (
        archs.build(load_file(start_file)).requires_grad_(True),
        Patch(recipe.discriminator_channels),
    )
    once, least = (estimate(network, discriminator, None, recipe, checkpointing=value) for value in (False, True))
    assert least < once
    train(large_photo, plain, request_(), budget=once)
    lines = []
    train(large_photo, twice, request_(), budget=least, log=lines.append)
    assert any("computed twice" in line for line in lines)
    assert equal(plain, twice)
    with pytest.raises(BudgetError, match="smaller batch than 4"):
        train(large_photo, tmp_path / "none.safetensors", request_(), budget=least - 1)


def test_step_three_trains_on_the_output_of_step_two(large_photo, request_, tmp_path):
    first, second = tmp_path / "sr2.safetensors", tmp_path / "sr3.safetensors"
    train(large_photo, first, request_())
    events = train(large_photo, second, request_(step=3, previous=(first,)))
    assert events[0].values["width"] == 160  # too small to be enlarged to the output's 512
    assert (events[1].values["height"], events[1].values["width"]) == (96, 128)
    assert read_provenance(second)["step"] == 3


def test_swinir_trains(large_photo, request_, recipe, tmp_path):
    out = tmp_path / "sr.safetensors"
    shape = Shape("swinir", channels=12, blocks=1)
    train(large_photo, out, request_(recipe=recipe.replace(iterations=1), start="scratch", shape=shape))
    assert archs.identify(load_file(out)).name == "swinir"


def test_source_names_a_photograph_once(large_photo, request_, recipe, tmp_path):
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third"))
    changes = {"recipe": recipe.replace(iterations=1, chain=0.0), "licence": "CC0-1.0", "structure": None}
    train(large_photo, first, request_(**changes, source="a tree"))
    train(large_photo, second, request_(**changes, source="a tree", start=str(first)))
    train(large_photo, third, request_(**changes, source="a lake", start=str(second)))
    origin = "fine-tuned on a tree, started from start.safetensors"
    assert [read_provenance(path)["source"] for path in (second, third)] == [
        origin,
        f"fine-tuned on a lake, started from {origin}",
    ]
    assert read_provenance(third)["licence"] == "CC0-1.0; not stated"


def test_photograph_alone(large_photo, request_, recipe, tmp_path):
    recipe = recipe.replace(degradation="bsrgan", rotate=True, held_out=0.0, iterations=2)
    events = train(large_photo, tmp_path / "sr.safetensors", request_(recipe=recipe, structure=None))
    assert {"pixel", "texture"} <= next(e.losses.keys() for e in events if isinstance(e, IterationDone))
    assert not any(e.held_out for e in events if isinstance(e, Validated))


def test_without_vgg_texture_replaces_perceptual(large_photo, request_, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    lines = []
    request = request_(recipe=recipe.replace(perceptual=1.0, texture=0.0, iterations=1))
    events = train(large_photo, tmp_path / "sr.safetensors", request, log=lines.append)
    assert any("no VGG weights" in line for line in lines)
    assert "texture" in next(e.losses for e in events if isinstance(e, IterationDone))


@pytest.mark.slow
def test_resume_with_vgg(large_photo, request_, with_features, vgg_file, tmp_path):
    """Stops before and after the start of the adversarial loss, with all losses of VGG's features."""
    whole = tmp_path / "whole.safetensors"
    recipe = with_features.replace(perceptual=0.4, perceptual_layers="forms", detail=2.0)
    request = request_(recipe=recipe, vgg=vgg_file)
    events = train(large_photo, whole, request)
    losses = [set(e.losses) for e in events if isinstance(e, IterationDone)]
    supervised = {"pixel", "consistency", "perceptual", "detail", "texture", "feature_texture", "checkerboard"}
    assert losses[-1] == supervised | {"adv", "d"}
    assert read_provenance(whole)["vgg"]["network"] == "VGG-16"
    for iteration in (1, 3):
        cut = tmp_path / f"{iteration}.safetensors"
        with pytest.raises(Interrupted):
            train(large_photo, cut, request, on_event=stop_after(iteration))
        train(large_photo, cut, request, resume=True)
        assert equal(whole, cut), iteration


@pytest.mark.slow
def test_projected_discriminator_learns(large_photo, request_, with_features, vgg_file, tmp_path):
    recipe = with_features.replace(iterations=20, adversarial=1e-9, discriminator_rate=2e-3, gan_from=99)
    events = train(large_photo, tmp_path / "sr.safetensors", request_(recipe=recipe, vgg=vgg_file))
    values = [e.losses["d"] for e in events if isinstance(e, IterationDone)]
    assert sum(values[-3:]) / 3 < 0.8 * sum(values[:3]) / 3


def test_missing_vgg_is_refused(large_photo, request_, with_features, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match="VGG weights: not found .* give vgg='FILE', or use the preset quick") as error:
        train(large_photo, tmp_path / "sr.safetensors", request_(recipe=with_features))
    assert "\n" not in str(error.value)


def test_nan_loss_stops(large_photo, request_, tmp_path, monkeypatch):
    original = ScoreGan.generator_loss
    monkeypatch.setattr(ScoreGan, "generator_loss", lambda *args: original(*args) * math.nan)
    message = r"loss adv is nan at iteration 3 \(last good checkpoint: .*, iteration 2\)"
    with pytest.raises(EngineError, match=message) as error:
        train(large_photo, tmp_path / "sr.safetensors", request_())
    assert "\n" not in str(error.value)
    assert checkpoint_path(tmp_path / "sr.safetensors").exists()


def test_resume_refuses_other_settings(large_photo, request_, tmp_path):
    out = tmp_path / "sr.safetensors"
    with pytest.raises(Interrupted):
        train(large_photo, out, request_(), on_event=stop_after(2))
    with pytest.raises(ResumeError, match="unfinished"):
        train(large_photo, out, request_())
    with pytest.raises(ResumeError, match="seed = 0, not 5"):
        train(large_photo, out, request_(seed=5), resume=True)


def test_resume_of_new_and_finished_runs(large_photo, request_, tmp_path):
    """One command with resume, repeated until it succeeds, is a whole run."""
    train(large_photo, tmp_path / "a.safetensors", request_())
    train(large_photo, tmp_path / "b.safetensors", request_(), resume=True)
    assert equal(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(ResumeError, match="b.safetensors: the run is finished"):
        train(large_photo, tmp_path / "b.safetensors", request_(), resume=True)


def test_refusals_are_one_line(large_photo, request_, tmp_path):
    refusals = [
        ({"step": 5}, UsageError, "step=5: no super-resolution step"),
        ({"width": 0}, UsageError, "size=0: too small"),
        ({"width": 241}, InputError, "size=241: .* 160 px, .* use at most 240"),
        ({"width": 40}, InputError, "30x30 pixels to train on, smaller than a crop of 32x32"),
        ({"precision": "int8"}, UsageError, "precision = 'int8'"),
        ({"step": 3}, UsageError, "previous: 0 files for step 3 .* give 1"),
        ({"structure": None, "previous": ("x",)}, UsageError, "give structure too"),
        ({"start": "none.pth"}, InputError, "none.pth: no such weights"),
        ({"shape": Shape(blocks=3)}, UsageError, "blocks=3"),
        ({"shape": Shape(channels=16)}, UsageError, "channels=16"),
        ({"shape": Shape(architecture="swinir")}, UsageError, "not swinir"),
    ]
    for change, error, message in refusals:
        with pytest.raises(error, match=message) as refusal:
            train(large_photo, tmp_path / "sr.safetensors", request_(**change))
        assert "\n" not in str(refusal.value), change
