"""Fine-tuning on a few pixels: it learns, it resumes bit for bit, it writes what others can open, it refuses in one line."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from engine import archs
from engine.errors import BudgetError, EngineError, InputError, Interrupted, ResumeError, UsageError
from engine.model.checkpoints import read_provenance
from engine.training.losses.discriminators import Patch
from engine.training.photo import write_row
from engine.training.run.checkpoint import checkpoint_path
from engine.training.run.events import CheckpointSaved, IterationDone, Prepared, Reviewed, WeightsSaved
from engine.training.sr.footprint import estimate
from engine.training.sr.networks import Shape
from engine.training.sr.train import Request, Runtime, train_sr
from engine.training.sr.trainer import SRTrainer


@pytest.fixture
def request_(recipe, start_file, structure_file):
    return lambda **changes: Request(
        **{"recipe": recipe, "start": str(start_file), "structure": structure_file, "precision": "fp32"} | changes
    )


def train(photo, out, request, **runtime):
    events = []
    on_event = runtime.pop("on_event", lambda event: None)

    def both(event):
        events.append(event)
        on_event(event)

    train_sr(photo, out, request, Runtime(on_event=both, **runtime))
    return events


def stop_after(iteration, error=KeyboardInterrupt):
    def on_event(event):
        if isinstance(event, IterationDone) and event.iteration == iteration:
            raise error

    return on_event


def equal(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_run_writes_weights_that_others_open_and_its_record(large_photo, request_, start_file, tmp_path):
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
    reviews = [e for e in events if isinstance(e, Reviewed)]
    assert [e.iteration for e in reviews] == [2, 4, 6]
    assert all(e.held_out and e.psnr.keys() == {"bicubic", "start", "now"} for e in reviews)
    with Image.open(reviews[0].sample) as image:
        assert image.size == (4 * 32, 4 * 32)  # four columns; three crops and a simulated input
    assert isinstance(events[-1], WeightsSaved)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("sr")) == [
        "sr-samples", "sr.safetensors", "sr.safetensors.log.jsonl",
    ]  # fmt: skip
    assert json.loads((tmp_path / "sr.safetensors.log.jsonl").read_text().splitlines()[-1])["event"] == "WeightsSaved"


def test_noise_channels_are_trained_and_kept(large_photo, request_, recipe, start_file, tmp_path):
    """And a step above trains behind them."""
    wanted = request_(recipe=recipe.replace(noise_channels=4))
    out, same, above = (tmp_path / f"{name}.safetensors" for name in ("sr", "same", "above"))
    train(large_photo, out, wanted)
    assert load_file(out).keys() == {*load_file(start_file), "conv_noise.weight"}
    with pytest.raises(Interrupted):
        train(large_photo, same, wanted, on_event=stop_after(3))
    train(large_photo, same, wanted, resume=True)
    assert equal(out, same)
    train(large_photo, above, request_(step=3, previous=(out,), width=128))


def test_it_learns(large_photo, request_, recipe, tmp_path):
    recipe = recipe.replace(iterations=60, adversarial=0.0, ema=0.8, milestones=(), checkpoint_every=60)
    *_, review, _, _ = train(large_photo, tmp_path / "sr.safetensors", request_(recipe=recipe))
    assert review.psnr["now"] > review.psnr["start"] + 3


@pytest.mark.parametrize(
    ("given", "trained_at"),
    [((192, 144), [128, 96]), ((120, 90), [128, 96]), ((86, 64), [128, 96]), ((85, 64), [85, 64])],
    ids=["larger", "a little smaller", "the smallest that is enlarged", "too small"],
)
def test_a_photograph_is_brought_to_the_size_of_the_output(request_, recipe, picture, tmp_path, given, trained_at):
    width, height = given
    write_row([picture(height, width)], tmp_path / "photo.png")
    events = train(tmp_path / "photo.png", tmp_path / "sr.safetensors", request_(recipe=recipe.replace(iterations=2)))
    assert [events[0].values[side] for side in ("width", "height")] == trained_at


@pytest.mark.parametrize("iteration", [1, 2, 5])
def test_resumed_run_equals_uninterrupted_run(large_photo, request_, tmp_path, iteration):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    train(large_photo, whole, request_())
    with pytest.raises(Interrupted, match="resume goes on") as error:
        train(large_photo, cut, request_(), on_event=stop_after(iteration))
    assert "\n" not in str(error.value)
    assert not cut.exists()
    train(large_photo, cut, request_(), resume=True)
    assert equal(whole, cut)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_crash_loses_the_interval_alone_in_half_precision_too(large_photo, request_, tmp_path, precision):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    train(large_photo, whole, request_(precision=precision))
    with pytest.raises(RuntimeError, match="power cut"):
        train(large_photo, cut, request_(precision=precision), on_event=stop_after(5, RuntimeError("power cut")))
    events = train(large_photo, cut, request_(precision=precision), resume=True)
    assert [e.iteration for e in events if isinstance(e, IterationDone)] == [5, 6]
    assert equal(whole, cut)


def test_resume_takes_the_chain_pictures_from_their_file(large_photo, request_, tmp_path, monkeypatch):
    out = tmp_path / "sr.safetensors"
    with pytest.raises(Interrupted):
        train(large_photo, out, request_(), on_event=stop_after(3))
    monkeypatch.setattr("engine.training.sr.train.simulate_inputs", None)  # would fail if it were called
    train(large_photo, out, request_(), resume=True)
    assert not (tmp_path / "sr.safetensors.chain").exists()


def test_global_random_state_is_untouched(large_photo, request_, tmp_path):
    before = torch.get_rng_state()
    train(large_photo, tmp_path / "sr.safetensors", request_())
    assert torch.equal(before, torch.get_rng_state())


def test_a_looked_at_run_trains_as_one_that_is_not(large_photo, request_, recipe, tmp_path):
    often, never = tmp_path / "often.safetensors", tmp_path / "never.safetensors"
    train(large_photo, often, request_(recipe=recipe.replace(checkpoint_every=1)))
    train(large_photo, never, request_(recipe=recipe.replace(checkpoint_every=100)))
    assert equal(often, never)


def test_computing_twice_changes_nothing_but_memory(large_photo, request_, recipe, start_file, tmp_path):
    plain, twice = tmp_path / "plain.safetensors", tmp_path / "twice.safetensors"
    network, judge = archs.build(load_file(start_file)).requires_grad_(True), Patch(recipe.discriminator_channels)
    once, least = (estimate(network, judge, None, recipe, checkpointing=value) for value in (False, True))
    assert least < once
    train(large_photo, plain, request_(), budget=once)
    lines = []
    train(large_photo, twice, request_(), budget=least, log=lines.append)
    assert any("computed twice" in line for line in lines)
    assert equal(plain, twice)
    with pytest.raises(BudgetError, match="smaller batch than 4"):
        train(large_photo, tmp_path / "none.safetensors", request_(), budget=least - 1)


def test_step_three_trains_on_what_the_weights_of_step_two_make(large_photo, request_, tmp_path):
    first, second = tmp_path / "sr2.safetensors", tmp_path / "sr3.safetensors"
    train(large_photo, first, request_())
    events = train(large_photo, second, request_(step=3, previous=(first,)))
    assert events[0].values["width"] == 160  # the photograph has too little to be enlarged; a render makes 512
    assert (events[1].values["height"], events[1].values["width"]) == (96, 128)
    assert read_provenance(second)["step"] == 3


def test_swinir_trains(large_photo, request_, recipe, tmp_path):
    out = tmp_path / "sr.safetensors"
    shape = Shape("swinir", channels=12, blocks=1)
    train(large_photo, out, request_(recipe=recipe.replace(iterations=1), start="scratch", shape=shape))
    assert archs.identify(load_file(out)).name == "swinir"


def test_what_is_trained_again_says_so_once(large_photo, request_, recipe, tmp_path):
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third"))
    wanted = {"recipe": recipe.replace(iterations=1, chain=0.0), "licence": "CC0-1.0", "structure": None}
    train(large_photo, first, request_(**wanted, source="a tree"))
    train(large_photo, second, request_(**wanted, source="a tree", start=str(first)))
    train(large_photo, third, request_(**wanted, source="a lake", start=str(second)))
    origin = "fine-tuned on a tree, started from start.safetensors"
    assert [read_provenance(path)["source"] for path in (second, third)] == [
        origin,
        f"fine-tuned on a lake, started from {origin}",
    ]
    assert read_provenance(third)["licence"] == "CC0-1.0; not stated"


def test_a_photograph_alone_is_enough(large_photo, request_, recipe, tmp_path):
    recipe = recipe.replace(degradation="bsrgan", rotate=True, held_out=0.0, iterations=2)
    events = train(large_photo, tmp_path / "sr.safetensors", request_(recipe=recipe, structure=None))
    assert {"pixel", "texture"} <= next(e.losses.keys() for e in events if isinstance(e, IterationDone))
    assert not any(e.held_out for e in events if isinstance(e, Reviewed))


def test_without_vgg_weights_patches_take_the_place_of_features(large_photo, request_, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    lines = []
    wanted = request_(recipe=recipe.replace(perceptual=1.0, texture=0.0, iterations=1))
    events = train(large_photo, tmp_path / "sr.safetensors", wanted, log=lines.append)
    assert any("no VGG weights" in line for line in lines)
    assert "texture" in next(e.losses for e in events if isinstance(e, IterationDone))


@pytest.mark.parametrize("iteration", [1, 3])
def test_a_run_that_looks_through_vgg_resumes_as_any_other(
    large_photo, request_, with_features, vgg_file, tmp_path, iteration
):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    wanted = request_(recipe=with_features, vgg=vgg_file)
    events = train(large_photo, whole, wanted)
    losses = [set(e.losses) for e in events if isinstance(e, IterationDone)]
    assert losses[-1] == {"pixel", "consistency", "texture", "feature_texture", "checkerboard", "adv", "d"}
    assert read_provenance(whole)["vgg"]["network"] == "VGG-16"
    with pytest.raises(Interrupted):
        train(large_photo, cut, wanted, on_event=stop_after(iteration))
    train(large_photo, cut, wanted, resume=True)
    assert equal(whole, cut)


def test_a_network_learns_forms_and_detail(large_photo, request_, with_features, vgg_file, tmp_path):
    out, cut = tmp_path / "sr.safetensors", tmp_path / "cut.safetensors"
    recipe = with_features.replace(perceptual=0.4, perceptual_layers="forms", detail=2.0)
    wanted = request_(recipe=recipe, vgg=vgg_file)
    events = train(large_photo, out, wanted)
    losses = [set(e.losses) for e in events if isinstance(e, IterationDone)]
    assert {"perceptual", "detail"} <= losses[0]
    with pytest.raises(Interrupted):
        train(large_photo, cut, wanted, on_event=stop_after(3))
    train(large_photo, cut, wanted, resume=True)
    assert equal(out, cut)


def test_the_discriminator_of_maps_learns(large_photo, request_, with_features, vgg_file, tmp_path):
    recipe = with_features.replace(iterations=20, adversarial=1e-9, discriminator_rate=2e-3, gan_from=99)
    events = train(large_photo, tmp_path / "sr.safetensors", request_(recipe=recipe, vgg=vgg_file))
    judged = [e.losses["d"] for e in events if isinstance(e, IterationDone)]
    assert sum(judged[-3:]) / 3 < 0.8 * sum(judged[:3]) / 3


def test_maps_cannot_be_had_without_weights(large_photo, request_, with_features, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"no VGG weights \(--vgg FILE.*take preset quick") as error:
        train(large_photo, tmp_path / "sr.safetensors", request_(recipe=with_features))
    assert "\n" not in str(error.value)


def test_nan_stops_and_names_the_last_checkpoint(large_photo, request_, tmp_path, monkeypatch):
    fooling = SRTrainer._fooling
    monkeypatch.setattr(SRTrainer, "_fooling", lambda *args: fooling(*args) * math.nan)
    with pytest.raises(EngineError, match=r"iteration 3: the loss 'adv'.*\(iteration 2\)") as error:
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


def test_resume_begins_where_nothing_was_begun_and_refuses_what_is_finished(large_photo, request_, tmp_path):
    """So one command, repeated until it succeeds, is a whole run."""
    train(large_photo, tmp_path / "a.safetensors", request_())
    train(large_photo, tmp_path / "b.safetensors", request_(), resume=True)
    assert equal(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(ResumeError, match="b.safetensors: is finished"):
        train(large_photo, tmp_path / "b.safetensors", request_(), resume=True)


def test_a_checkpoint_is_saved_before_the_first_iteration(large_photo, request_, tmp_path):
    events = train(large_photo, tmp_path / "sr.safetensors", request_())
    assert [e.iteration for e in events if isinstance(e, CheckpointSaved)] == [0, 2, 4]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": 5}, UsageError, "step = 5"),
        ({"width": 241}, InputError, "160 px wide, .* take at most 240"),
        ({"width": 40}, InputError, "30x30 pixels to train on, smaller than a crop of 32x32"),
        ({"precision": "int8"}, UsageError, "int8"),
        ({"step": 3}, UsageError, "takes 1 files"),
        ({"structure": None, "previous": ("x",)}, UsageError, "give the structure"),
        ({"start": "none.pth"}, InputError, "no such file"),
        ({"shape": Shape(blocks=3)}, UsageError, "blocks=3"),
        ({"shape": Shape(channels=16)}, UsageError, "channels=16"),
        ({"shape": Shape(architecture="swinir")}, UsageError, "not swinir"),
    ],
)
def test_wrong_requests(large_photo, request_, tmp_path, change, error, message):
    with pytest.raises(error, match=message) as found:
        train(large_photo, tmp_path / "sr.safetensors", request_(**change))
    assert "\n" not in str(found.value)
