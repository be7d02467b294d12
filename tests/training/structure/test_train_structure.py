"""Training of step 1 on a few pixels: it learns, it resumes bit for bit, it stops when it must."""

import json
import math
import os
import signal
import threading

import pytest
import torch
from PIL import Image

from engine.archs.hpvaegan import Config
from engine.errors import EngineError, InputError, Interrupted, ResumeError, UsageError
from engine.io.photo import open_photo
from engine.model.structure_file import read_structure, structure_metadata
from engine.training.losses.texture import TEXTURE_LAYERS, FeatureWasserstein, SlicedWasserstein
from engine.training.losses.vgg import VGGFeatures
from engine.training.run.checkpoint import checkpoint_path
from engine.training.run.events import CheckpointSaved, IterationDone, ScaleFinished, ScaleStarted, StructureSaved
from engine.training.structure.losses import Coherence, Losses, Wasserstein, vae_patch_distance
from engine.training.structure.train import train_structure
from engine.training.structure.trainer import Settings, StructureTrainer, seeded_noise


def tensors_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def interrupt_at(scale, iteration):
    def on_event(event):
        if isinstance(event, IterationDone) and (event.phase, event.iteration) == (scale, iteration):
            raise KeyboardInterrupt

    return on_event


def make_trainer(photo, options, iterations=(1, 1, 1), vgg=None, **changes):
    settings = {"base_width": 32, "least_width": 12, "precision": "fp32"}
    settings |= {"batch": 1, "losses": Losses(), "sigma": 0.05, "ema": 0.0, "seed": 0} | changes
    return StructureTrainer(
        Settings(iterations=iterations, config=options["config"], photo="", **settings),
        open_photo(photo, 32),
        {},
        photo.parent,
        torch.device("cpu"),
        vgg,
    )


def at_the_last_scale(trainer):
    """One iteration of each scale below, and the last one begun."""
    for _ in range(2):
        trainer.begin()
        trainer.step()
        trainer.end()
    trainer.begin()
    return trainer


def test_run_writes_the_structure_and_its_record(photo, options, tmp_path):
    out, events = tmp_path / "s.safetensors", []
    structure = train_structure(
        photo, out, **options, seed=3, licence="CC0-1.0", source="a test", on_event=events.append
    )
    assert not checkpoint_path(out).exists()
    loaded = read_structure(out)
    assert loaded.base_size == structure.base_size == (24, 32)
    metadata = structure_metadata(loaded)
    assert metadata["photo"]["name"] == "photo.png"
    assert (metadata["photo"]["width"], metadata["photo"]["height"]) == (64, 48)
    assert (metadata["licence"], metadata["source"], metadata["seed"]) == ("CC0-1.0", "a test", 3)
    assert metadata["iterations"] == [6, 4, 5]
    assert metadata["engine"]
    assert loaded.sigmas[0] == 1
    assert bool((loaded.sigmas[1:] > 0).all())

    kinds = [e.kind for e in events if isinstance(e, ScaleStarted)]
    assert kinds == ["vae", "vae", "gan"]
    iterations = [e for e in events if isinstance(e, IterationDone)]
    assert [(e.phase, e.iteration) for e in iterations[-5:]] == [(2, i) for i in range(1, 6)]
    assert iterations[-1].eta == 0
    assert set(iterations[-1].losses) == {"rec", "adv", "critic", "penalty"}
    for event in events:
        if isinstance(event, ScaleFinished):
            with Image.open(event.sample) as image:
                height, width = structure.sizes[event.scale]
                assert image.size == (5 * width, height)
    assert isinstance(events[-1], StructureSaved)
    assert events[-1].bytes == out.stat().st_size
    lines = (tmp_path / "s.safetensors.log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "StructureSaved"


def test_reconstruction_improves_at_every_scale(photo, options, tmp_path):
    options |= {"iterations": (100, 40, 60)}
    errors = {0: [], 1: [], 2: []}

    def on_event(event):
        if isinstance(event, IterationDone):
            errors[event.phase].append(event.losses["rec"])

    train_structure(photo, tmp_path / "s", **options, on_event=on_event)
    for values, share in zip(errors.values(), (0.5, 0.8, 0.95), strict=True):
        assert sum(values[-10:]) < share * sum(values[:10])


def test_global_random_state_is_untouched(photo, options, tmp_path):
    before = torch.get_rng_state()
    train_structure(photo, tmp_path / "s", **options)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("where", [(0, 3), (0, 6), (1, 1), (2, 2), (2, 5)])
def test_resumed_run_equals_uninterrupted_run(photo, options, tmp_path, where):
    whole = train_structure(photo, tmp_path / "whole", **options)
    with pytest.raises(Interrupted, match="resume goes on") as error:
        train_structure(photo, tmp_path / "cut", **options, on_event=interrupt_at(*where))
    assert error.value.exit_code == 130
    assert "\n" not in str(error.value)
    resumed = train_structure(photo, tmp_path / "cut", **options, resume=True)
    assert tensors_equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("kind", [ScaleStarted, ScaleFinished, CheckpointSaved])
def test_resume_after_a_stop_between_scales(photo, options, tmp_path, kind):
    whole = train_structure(photo, tmp_path / "whole", **options)
    seen = []

    def stop_at_the_second(event):
        if isinstance(event, kind):
            seen.append(event)
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train_structure(photo, tmp_path / "cut", **options, on_event=stop_at_the_second)
    resumed = train_structure(photo, tmp_path / "cut", **options, resume=True)
    assert tensors_equal(whole.state_dict(), resumed.state_dict())


def test_a_crash_goes_back_to_the_last_checkpoint(photo, options, tmp_path):
    whole = train_structure(photo, tmp_path / "whole", **options)

    def crash(event):
        if isinstance(event, IterationDone) and (event.phase, event.iteration) == (2, 4):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train_structure(photo, tmp_path / "cut", **options, checkpoint_every=3, on_event=crash)
    events = []
    resumed = train_structure(photo, tmp_path / "cut", **options, resume=True, on_event=events.append)
    assert (events[0].scale, events[0].iteration) == (2, 3)
    assert tensors_equal(whole.state_dict(), resumed.state_dict())


def test_ctrl_c_stops_after_the_iteration(photo, options, tmp_path):
    def press(event):
        if isinstance(event, IterationDone) and (event.phase, event.iteration) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="scale 1, iteration 2"):
        train_structure(photo, tmp_path / "s", **options, on_event=press)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_within_an_iteration_keeps_the_last_checkpoint(photo, options, tmp_path, monkeypatch):
    whole = train_structure(photo, tmp_path / "whole", **options)
    step, calls = StructureTrainer.step, []

    def interrupted_step(self):
        calls.append(None)
        if len(calls) == 3:
            self.structure.decoder.tail.bias.data += 1
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(StructureTrainer, "step", interrupted_step)
    with pytest.raises(Interrupted, match=r"\(scale 0, iteration 0\)"):
        train_structure(photo, tmp_path / "cut", **options)
    monkeypatch.undo()
    resumed = train_structure(photo, tmp_path / "cut", **options, resume=True)
    assert tensors_equal(whole.state_dict(), resumed.state_dict())


def test_runs_outside_the_main_thread(photo, options, tmp_path):
    thread = threading.Thread(target=train_structure, args=(photo, tmp_path / "s"), kwargs=options)
    thread.start()
    thread.join()
    assert (tmp_path / "s").exists()


def test_nan_stops_and_names_the_last_checkpoint(photo, options, tmp_path, monkeypatch):
    original = Wasserstein.penalty
    monkeypatch.setattr(Wasserstein, "penalty", lambda *args: original(*args) * math.nan)
    with pytest.raises(EngineError, match=r"scale 2, iteration 1.*'penalty'.*\(scale 2, iteration 0\)") as error:
        train_structure(photo, tmp_path / "s", **options)
    assert "\n" not in str(error.value)
    assert checkpoint_path(tmp_path / "s").exists()
    assert not (tmp_path / "s").exists()


def test_nan_weights_are_never_saved(photo, options, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.training.structure.trainer.LEARNING_RATE", math.inf)
    with pytest.raises(EngineError, match="weight is NaN") as error:
        train_structure(photo, tmp_path / "s", **options, checkpoint_every=1)
    assert "(scale 0, iteration 0)" in str(error.value)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(photo, options, tmp_path, precision):
    options |= {"precision": precision, "iterations": 3}
    structure = train_structure(photo, tmp_path / "s", **options)
    assert bool(structure.sample(seeded_noise(0)).isfinite().all())


def test_batch_of_two(photo, options, tmp_path):
    losses = Losses(40.0, 80.0, 60.0, 2.0)
    train_structure(photo, tmp_path / "s", **options | {"iterations": 2}, batch=2, losses=losses)
    assert read_structure(tmp_path / "s").base_size == (24, 32)


def test_texture_brings_samples_patches_near_the_photographs(photo, options):
    """The same scale, from the same weights and with the same noise, with the loss and without."""

    def distance(weight):
        trainer = at_the_last_scale(make_trainer(photo, options, (1, 1, 60), losses=Losses(texture=weight)))
        found = [trainer.step().losses for _ in range(60)]
        assert ("texture" in found[0]) == (weight > 0)
        sample = trainer.structure.sample(seeded_noise(0))[None]
        real = (trainer.reals[2] + 1) / 2
        return float(SlicedWasserstein(heights=1.0)(sample, real, torch.Generator().manual_seed(0)))

    assert distance(60.0) < 0.8 * distance(0.0)


@pytest.mark.parametrize("name", ["vae_texture", "vae_coherence"])
def test_samples_of_a_patch_vae_get_the_photographs_patches(photo, options, name):
    """The same two scales from the same weights, with the loss and without; at both scales."""

    def distances(weight):
        trainer = make_trainer(photo, options, (60, 60, 1), losses=Losses(**{name: weight}))
        for _ in range(2):
            trainer.begin()
            found = [trainer.step().losses for _ in range(60)]
            assert found[-1].keys() == {"rec", "kl"} | ({name} if weight else set())
            trainer.end()
        for scale in range(2):
            fake = torch.stack([trainer.structure.sample(seeded_noise(seed), last=scale) for seed in range(8)])
            real = ((trainer.reals[scale] + 1) / 2).expand_as(fake)
            if name == "vae_coherence":
                yield float(Coherence()(fake, real))
            else:
                yield float(vae_patch_distance(real.shape[2:])(fake, real, torch.Generator().manual_seed(0)))

    for ours, theirs in zip(distances(40.0), distances(0.0), strict=True):
        assert ours < 0.9 * theirs  # a mirrored photograph, the best there could be, is not far below


def test_without_such_a_loss_a_patch_vae_draws_no_sample(photo, options):
    """The paper's run is what it was, to the last random number."""
    draws = []
    for losses in (Losses(), Losses(texture=60.0)):
        trainer = make_trainer(photo, options, losses=losses)
        trainer.begin()
        trainer.step()
        draws.append(trainer.noise.get_state())
    expected = torch.Generator().manual_seed(0)
    torch.randn(1, options["config"].latent, *trainer.structure.sizes[0], generator=expected)
    assert all(torch.equal(state, expected.get_state()) for state in draws)


def test_detail_takes_the_excess_out_of_fine_texture(photo, options):
    """With as much noise its samples are grainy: the same scale, with the loss and without; nothing else asks for texture."""

    def distance(weight):
        trainer = at_the_last_scale(
            make_trainer(photo, options, (1, 1, 80), losses=Losses(detail=weight, adversarial=0.0), sigma=3.0)
        )
        found = [trainer.step().losses for _ in range(80)]
        assert ("detail" in found[0]) == (weight > 0)
        samples = torch.stack([trainer.structure.sample(seeded_noise(seed)) for seed in range(4)])
        real = ((trainer.reals[2] + 1) / 2).expand_as(samples)
        every_patch = SlicedWasserstein(3, scales=3, detail=True)
        return float(every_patch(samples, real, torch.Generator().manual_seed(0)))

    assert distance(8.0) < 0.7 * distance(0.0)


def test_feature_texture_brings_samples_maps_near_the_photographs(photo, options, vgg_file):
    vgg = VGGFeatures(vgg_file, TEXTURE_LAYERS)

    def distance(weight):
        losses = Losses(feature_texture=weight)
        trainer = at_the_last_scale(make_trainer(photo, options, (1, 1, 60), vgg, losses=losses))
        for _ in range(60):
            trainer.step()
        sample = trainer.structure.sample(seeded_noise(0))[None]
        maps = (vgg(picture) for picture in (sample, (trainer.reals[2] + 1) / 2))
        heights = torch.linspace(-1, 1, 24)
        return float(FeatureWasserstein()(*maps, torch.Generator().manual_seed(0), heights=heights))

    assert distance(20.0) < 0.8 * distance(0.0)


def test_a_projected_discriminator_learns_to_tell_samples(photo, options, vgg_file):
    losses = Losses(adversarial=0.0, discriminator="projected")
    trainer = at_the_last_scale(
        make_trainer(photo, options, (1, 1, 40), VGGFeatures(vgg_file, losses.layers), losses=losses)
    )
    found = [trainer.step().losses["critic"] for _ in range(40)]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_a_long_photograph_is_seen_by_vgg(options, vgg_file, tmp_path):
    """Of 32 x 5 pixels at the last scale, which VGG could not halve three times; of 12 x 1 at the first."""
    losses = Losses(40.0, 80.0, detail=2.0, feature_texture=20.0, discriminator="projected")
    Image.effect_noise((128, 20), 80).convert("RGB").save(tmp_path / "long.png")
    train_structure(tmp_path / "long.png", tmp_path / "s", **options | {"iterations": 2}, losses=losses, vgg=vgg_file)
    assert read_structure(tmp_path / "s").base_size == (5, 32)


def test_what_looks_through_vgg_resumes_bit_for_bit(photo, options, vgg_file, tmp_path):
    losses = Losses(
        40.0, 80.0, texture=60.0, detail=2.0, feature_texture=20.0, adversarial=0.3, discriminator="projected"
    )
    options |= {"losses": losses, "vgg": vgg_file}
    whole = train_structure(photo, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        train_structure(photo, tmp_path / "cut", **options, on_event=interrupt_at(2, 3))
    resumed = train_structure(photo, tmp_path / "cut", **options, resume=True)
    assert tensors_equal(whole.state_dict(), resumed.state_dict())
    assert resumed.provenance["discriminator"] == "projected"
    assert resumed.provenance["vgg"]["network"] == "VGG-16"


def test_losses_that_need_vgg_say_so(photo, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for losses in (Losses(feature_texture=1.0), Losses(discriminator="projected")):
        with pytest.raises(InputError, match="no VGG weights"):
            train_structure(photo, tmp_path / "s", **options, losses=losses)
    assert not list(tmp_path.glob("s*"))


def test_only_the_current_scale_trains(photo, options):
    trainer = make_trainer(photo, options)
    modules = {"decoder": trainer.structure.decoder, "encoder": trainer.encoder, "critic": trainer.discriminator}
    modules |= {f"block{m}": block for m, block in enumerate(trainer.structure.blocks, 1)}
    expected = [{"decoder", "encoder"}, {"decoder", "encoder", "block1"}, {"block2", "critic"}]
    for moving in expected:
        trainer.begin()
        before = {name: [p.clone() for p in module.parameters()] for name, module in modules.items()}
        trainer.step()
        moved = {
            name
            for name, module in modules.items()
            if any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
        }
        assert moved == moving
        trainer.end()


def test_learning_rate_of_the_base_decays(photo, options):
    trainer = make_trainer(photo, options)
    trainer.begin()
    assert [g["lr"] for g in trainer._optimisers[0].param_groups] == [5e-4]
    trainer.end()
    trainer.begin()
    assert [g["lr"] for g in trainer._optimisers[0].param_groups] == pytest.approx([5e-4, 1e-4])


def test_a_new_block_starts_as_the_previous_one(photo, options):
    trainer = at_the_last_scale(make_trainer(photo, options))
    first, second = (block.state_dict() for block in trainer.structure.blocks)
    assert tensors_equal(first, second)


def test_noise_is_a_share_of_what_the_scales_below_have_left(photo, options):
    usual, ten = (at_the_last_scale(make_trainer(photo, options, sigma=sigma)).structure for sigma in (0.05, 0.5))
    assert 0 < usual.sigmas[2] < 0.05 * 2
    assert ten.sigmas[2] == pytest.approx(10 * usual.sigmas[2].item(), rel=1e-4)


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_a_gan_block_is_left_as_the_running_mean_of_its_weights(photo, options, ema):
    """Of 0.75: at first the plain mean, so that where it began has no weight. A longer run shows the weights on the way."""
    short, longer = (at_the_last_scale(make_trainer(photo, options, (1, 1, count), ema=ema)) for count in (6, 7))
    assert tensors_equal(short.structure.state_dict(), longer.structure.state_dict())
    mean = [torch.zeros_like(p) for p in longer.structure.blocks[1].parameters()]
    for count in range(1, 7):
        short.step()
        longer.step()
        for kept, weight in zip(mean, longer.structure.blocks[1].parameters(), strict=True):
            kept.lerp_(weight.detach(), max(1 - ema, 1 / count))
    for kept, left, last in zip(mean, *(t.structure.blocks[1].parameters() for t in (short, longer)), strict=True):
        assert torch.equal(left, kept)
        assert torch.equal(left, last) == (not ema)


def test_gradient_penalty_is_per_pixel(photo, options, monkeypatch):
    trainer = make_trainer(photo, options)
    # A gradient of 2 in the first channel of every pixel: (2 - 1)^2.
    monkeypatch.setattr(
        trainer.discriminator, "input_gradient", lambda x: x * 0 + torch.tensor([2.0, 0, 0]).view(3, 1, 1)
    )
    real, fake = torch.rand(1, 3, 5, 6), torch.rand(1, 3, 5, 6)
    assert trainer.adversary.penalty(real, fake, trainer.noise).item() == pytest.approx(1.0)


def test_resume_refuses_other_settings(photo, options, tmp_path):
    with pytest.raises(Interrupted):
        train_structure(photo, tmp_path / "s", **options, on_event=interrupt_at(1, 2))
    with pytest.raises(ResumeError, match="unfinished"):
        train_structure(photo, tmp_path / "s", **options)
    with pytest.raises(ResumeError, match="seed = 0, not 5"):
        train_structure(photo, tmp_path / "s", **options, seed=5, resume=True)
    Image.new("RGB", (64, 48)).save(photo)
    with pytest.raises(ResumeError, match="photo"):
        train_structure(photo, tmp_path / "s", **options, resume=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"iterations": 0}, UsageError, "iterations = 0"),
        ({"iterations": (1, 2)}, UsageError, "or 3 numbers"),
        ({"precision": "int8"}, UsageError, "int8"),
        ({"device": "abacus"}, UsageError, "abacus"),
        ({"batch": 0}, UsageError, "batch = 0"),
        ({"sigma": -0.1}, UsageError, "sigma = -0.1"),
        ({"sigma": float("inf")}, UsageError, "sigma = inf"),
        ({"ema": 1.0}, UsageError, "ema = 1.0"),
        ({"ema": -0.1}, UsageError, "ema = -0.1"),
        ({"checkpoint_every": 0}, UsageError, "checkpoint_every = 0"),
        ({"base_width": 256}, InputError, "64 px wide"),
    ],
)
def test_wrong_requests(photo, options, tmp_path, change, error, message):
    with pytest.raises(error, match=message) as found:
        train_structure(photo, tmp_path / "s", **options | change)
    assert "\n" not in str(found.value)


def test_wrong_places(photo, options, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        train_structure(photo, tmp_path / "none" / "s", **options)
    with pytest.raises(InputError, match="is a folder"):
        train_structure(photo, tmp_path, **options)


def test_defaults_are_the_papers():
    assert Config() == Config(last=9, last_vae=3, coordinates=True, padding="zeros", channels=64, latent=128, layers=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae_texture": -1.0}, "vae_texture = -1.0"),
        ({"vae_coherence": float("inf")}, "vae_coherence = inf"),
        ({"texture": -1.0}, "texture = -1.0"),
        ({"detail": -1.0}, "detail = -1.0"),
        ({"texture": float("nan")}, "texture = nan"),
        ({"feature_texture": float("inf")}, "feature_texture = inf"),
        ({"adversarial": -0.5}, "adversarial = -0.5"),
        ({"discriminator": "vgg"}, "'vgg': choose one of wgan, projected"),
    ],
)
def test_wrong_losses(change, message):
    with pytest.raises(UsageError, match=message):
        Losses(**change)
