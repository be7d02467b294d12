"""Training of step 1 on a few pixels: it learns, resumes bit for bit and stops when it must."""

import json
import math
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.training import SMALL_NETWORKS, stop_after

from engine.archs.hpvaegan import Config
from engine.errors import EngineError, InputError, Interrupted, ResumeError, UsageError
from engine.io.photo import open_photo
from engine.model.structure_file import read_structure, structure_metadata
from engine.training.losses.coherence import Coherence
from engine.training.losses.texture import TEXTURE_LAYERS, FeatureWasserstein, FineTexture, SlicedWasserstein
from engine.training.losses.vgg import VGGFeatures
from engine.training.run.checkpoint import checkpoint_path
from engine.training.run.events import CheckpointSaved, IterationDone, ScaleFinished, ScaleStarted, StructureSaved
from engine.training.run.runtime import Runtime
from engine.training.structure.losses import LossWeights, WganGp, vae_patch_distance
from engine.training.structure.train import train_structure
from engine.training.structure.trainer import Settings, StructureTrainer, seeded_noise

ALL_LOSSES = {
    "vae_texture": 40.0, "vae_coherence": 80.0, "texture": 60.0, "detail": 2.0, "feature_texture": 20.0,
    "adversarial": 0.3, "discriminator": "projected",
}  # fmt: skip


def tensors_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_samples_repeat_and_the_network_is_the_same(photo, tmp_path, structure_request):
    """The photograph and its reconstruction, which do not repeat, come first in the row of sample images."""
    outs = [tmp_path / f"{name}.safetensors" for name in ("plain", "wrapped")]
    for out, wraps in zip(outs, ((False, False), (True, True)), strict=True):
        train_structure(photo, out, structure_request(iterations=(1, 1, 1)), Runtime(wraps=wraps))
    plain, wrapped = (read_structure(out) for out in outs)
    assert tensors_equal(plain.state_dict(), wrapped.state_dict())
    rows = [np.asarray(Image.open(out.with_name(out.stem + "-samples") / "scale-2.png")).astype(int) for out in outs]
    assert np.array_equal(rows[0][:, :1], rows[1][:, :1])
    assert not np.array_equal(*rows)


@pytest.mark.parametrize("coordinates", [False, True])
def test_circular_padding_makes_a_network_that_repeats(photo, tmp_path, structure_request, coordinates):
    out, networks = tmp_path / "tile.safetensors", replace(SMALL_NETWORKS, padding="circular", coordinates=coordinates)
    train_structure(photo, out, structure_request(iterations=(1, 1, 1), networks=networks), Runtime())
    network = read_structure(out)
    assert network.wraps == (True, True)
    image = torch.rand(1, 3, *network.sizes[1]) * 2 - 1
    below, moved = network.blocks[1].body(network.blocks[1].head(image)), image.roll((0, 5), (2, 3))
    assert torch.allclose(network.blocks[1].body(network.blocks[1].head(moved)), below.roll(5, 3), atol=1e-4)
    mirrored = network.wrapped((False, False))
    assert not torch.equal(mirrored.sample(seeded_noise(0)), network.sample(seeded_noise(0)))


def test_losses_see_a_photograph_that_repeats_from_any_pixel(make_trainer):
    x = torch.rand(1, 3, 24, 32)
    fake, real = make_trainer()._moved(x, x)
    assert fake is real is x
    trainer = make_trainer(networks=replace(SMALL_NETWORKS, padding="circular"))
    moved = [trainer._moved(x, -x) for _ in range(3)]
    for fake, real in moved:
        assert torch.equal(fake, -real)
        assert torch.equal(fake.flatten().sort().values, x.flatten().sort().values)
    assert len({float(fake[0, 0, 0, 0]) for fake, _ in moved}) > 1


def train(photo, out, request, on_event=lambda event: None, resume=False):
    return train_structure(photo, out, request, Runtime(on_event=on_event, resume=resume))


@pytest.fixture
def make_trainer(photo, structure_request):
    """Factory of trainers; keywords as ``structure_request``, losses other than the paper's as ``losses``."""

    def make(iterations=(1, 1, 1), vgg=None, losses=None, ema=0.0, **changes):
        request = structure_request(iterations=iterations, ema=ema, **changes)
        settings = Settings(
            iterations=request.iterations,
            config=request.config,
            base_width=request.base_width,
            least_width=request.least_width,
            precision=request.precision,
            batch=request.recipe.batch,
            losses=LossWeights(**(losses or {})),
            sigma=request.recipe.sigma,
            ema=request.recipe.ema,
            seed=request.seed,
            photo="",
        )
        return StructureTrainer(settings, open_photo(photo, 32), {}, photo.parent, torch.device("cpu"), vgg)

    return make


def at_last_scale(trainer):
    """The trainer after one iteration of each scale below the last one, which has begun."""
    for _ in range(2):
        trainer.begin()
        trainer.iterate()
        trainer.end()
    trainer.begin()
    return trainer


def test_file_and_events(photo, structure_request, tmp_path):
    out, events = tmp_path / "s.safetensors", []
    request = structure_request(seed=3, licence="CC0-1.0", source="a test")
    structure = train(photo, out, request, events.append)
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

    assert [e.kind for e in events if isinstance(e, ScaleStarted)] == ["vae", "vae", "gan"]
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


def test_reconstruction_improves(photo, structure_request, tmp_path):
    errors = {0: [], 1: [], 2: []}

    def on_event(event):
        if isinstance(event, IterationDone):
            errors[event.phase].append(event.losses["rec"])

    train(photo, tmp_path / "s", structure_request(iterations=(100, 40, 60)), on_event)
    for values, share in zip(errors.values(), (0.5, 0.8, 0.95), strict=True):
        assert sum(values[-10:]) < share * sum(values[:10])


def test_global_rng_unchanged(photo, structure_request, tmp_path):
    before = torch.get_rng_state()
    train(photo, tmp_path / "s", structure_request())
    assert torch.equal(before, torch.get_rng_state())


def second(kind):
    """Callback that interrupts at the second event of a kind."""
    seen = []

    def on_event(event):
        if isinstance(event, kind):
            seen.append(event)
            if len(seen) == 2:
                raise KeyboardInterrupt

    return on_event


def test_resumed_equals_uninterrupted(photo, structure_request, tmp_path):
    """Stops within scales, at their first and last iterations, and between scales."""
    whole = train(photo, tmp_path / "whole", structure_request())
    stops = {
        f"scale {phase}, iteration {i}": stop_after(i, phase) for phase, i in ((0, 3), (0, 6), (1, 1), (2, 2), (2, 5))
    }
    stops |= {kind.__name__: second(kind) for kind in (ScaleStarted, ScaleFinished, CheckpointSaved)}
    for name, on_event in stops.items():
        out = tmp_path / name
        with pytest.raises(Interrupted, match="continue with resume=True") as error:
            train(photo, out, structure_request(), on_event)
        assert error.value.exit_code == 130
        assert "\n" not in str(error.value)
        resumed = train(photo, out, structure_request(), resume=True)
        assert tensors_equal(whole.state_dict(), resumed.state_dict()), name


def test_crash_loses_only_the_interval(photo, structure_request, tmp_path):
    request = structure_request(checkpoint_every=3)
    whole = train(photo, tmp_path / "whole", request)
    with pytest.raises(RuntimeError, match="power cut"):
        train(photo, tmp_path / "cut", request, stop_after(4, 2, RuntimeError("power cut")))
    events = []
    resumed = train(photo, tmp_path / "cut", request, events.append, resume=True)
    assert events[0].parts[0].position == (2, 3)
    assert (events[1].scale, events[1].iteration) == (2, 3)
    assert tensors_equal(whole.state_dict(), resumed.state_dict())


def test_ctrl_c_stops_after_the_iteration(photo, structure_request, tmp_path):
    def press(event):
        if isinstance(event, IterationDone) and (event.phase, event.iteration) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="scale 1, iteration 2"):
        train(photo, tmp_path / "s", structure_request(), press)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_ctrl_c_keeps_the_checkpoint(photo, structure_request, tmp_path, monkeypatch):
    whole = train(photo, tmp_path / "whole", structure_request())
    iterate, calls = StructureTrainer.iterate, []

    def interrupted(self):
        if checkpoint_path(tmp_path / "cut").exists():  # not in the trial
            calls.append(None)
        if len(calls) == 3:
            self.structure.decoder.tail.bias.data += 1
            raise KeyboardInterrupt
        return iterate(self)

    monkeypatch.setattr(StructureTrainer, "iterate", interrupted)
    with pytest.raises(Interrupted, match=r"checkpoint, scale 0, iteration 0\)"):
        train(photo, tmp_path / "cut", structure_request())
    monkeypatch.undo()
    resumed = train(photo, tmp_path / "cut", structure_request(), resume=True)
    assert tensors_equal(whole.state_dict(), resumed.state_dict())


def test_runs_outside_the_main_thread(photo, structure_request, tmp_path):
    thread = threading.Thread(target=train, args=(photo, tmp_path / "s", structure_request()))
    thread.start()
    thread.join()
    assert (tmp_path / "s").exists()


def test_nan_loss_stops(photo, structure_request, tmp_path, monkeypatch):
    original = WganGp.penalty
    monkeypatch.setattr(WganGp, "penalty", lambda *args: original(*args) * math.nan)
    message = r"loss penalty is nan at scale 2, iteration 1 \(last good checkpoint: .*, scale 2, iteration 0\)"
    with pytest.raises(EngineError, match=message) as error:
        train(photo, tmp_path / "s", structure_request())
    assert "\n" not in str(error.value)
    assert checkpoint_path(tmp_path / "s").exists()
    assert not (tmp_path / "s").exists()


def test_nan_weights_are_not_saved(photo, structure_request, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.training.structure.trainer.LEARNING_RATE", math.inf)
    with pytest.raises(EngineError, match=r"a weight is NaN.*, scale 0, iteration 0\)"):
        train(photo, tmp_path / "s", structure_request(checkpoint_every=1))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(photo, structure_request, tmp_path, precision):
    structure = train(photo, tmp_path / "s", structure_request(iterations=(3,), precision=precision))
    assert bool(structure.sample(seeded_noise(0)).isfinite().all())


def test_batch_of_two(photo, structure_request, tmp_path):
    losses = {"vae_texture": 40.0, "vae_coherence": 80.0, "texture": 60.0, "detail": 2.0}
    train(photo, tmp_path / "s", structure_request(iterations=(2,), batch=2, **losses))
    assert read_structure(tmp_path / "s").base_size == (24, 32)


def test_texture_loss(make_trainer):
    """Samples' patches come nearer to the photograph's than without the loss, from the same weights and noise."""

    def distance(weight):
        trainer = at_last_scale(make_trainer((1, 1, 60), losses={"texture": weight}))
        losses = [trainer.iterate().values for _ in range(60)]
        assert ("texture" in losses[0]) == (weight > 0)
        sample = trainer.structure.sample(seeded_noise(0))[None]
        real = (trainer.reals[2] + 1) / 2
        return float(SlicedWasserstein(heights=1.0)(sample, real, torch.Generator().manual_seed(0)))

    assert distance(60.0) < 0.8 * distance(0.0)


@pytest.mark.parametrize("name", ["vae_texture", "vae_coherence"])
def test_vae_losses(make_trainer, name):
    """The same at both patch-VAE scales."""

    def distances(weight):
        trainer = make_trainer((60, 60, 1), losses={name: weight})
        for _ in range(2):
            trainer.begin()
            losses = [trainer.iterate().values for _ in range(60)]
            assert losses[-1].keys() == {"rec", "kl"} | ({name} if weight else set())
            trainer.end()
        for scale in range(2):
            fake = torch.stack([trainer.structure.sample(seeded_noise(seed), last=scale) for seed in range(8)])
            real = ((trainer.reals[scale] + 1) / 2).expand_as(fake)
            if name == "vae_coherence":
                yield float(Coherence()(fake, real))
            else:
                yield float(vae_patch_distance(real.shape[2:])(fake, real, torch.Generator().manual_seed(0)))

    for with_loss, without in zip(distances(40.0), distances(0.0), strict=True):
        assert with_loss < 0.9 * without  # the best possible, a mirrored photograph, is not far below


def test_vae_without_losses_draws_no_sample(make_trainer):
    """A run of the paper draws the paper's random numbers."""
    draws = []
    for losses in ({}, {"texture": 60.0}):
        trainer = make_trainer(losses=losses)
        trainer.begin()
        trainer.iterate()
        draws.append(trainer.rng.get_state())
    expected = torch.Generator().manual_seed(0)
    torch.randn(1, trainer.config.latent, *trainer.structure.sizes[0], generator=expected)
    assert all(torch.equal(state, expected.get_state()) for state in draws)


def test_detail_loss(make_trainer):
    """Fine texture in excess, from loud noise, is reduced; no other loss asks for texture."""

    def distance(weight):
        losses = {"detail": weight, "adversarial": 0.0}
        trainer = at_last_scale(make_trainer((1, 1, 80), losses=losses, sigma=3.0))
        values = [trainer.iterate().values for _ in range(80)]
        assert ("detail" in values[0]) == (weight > 0)
        samples = torch.stack([trainer.structure.sample(seeded_noise(seed)) for seed in range(4)])
        real = ((trainer.reals[2] + 1) / 2).expand_as(samples)
        return float(FineTexture()(samples, real, torch.Generator().manual_seed(0)))

    assert distance(8.0) < 0.7 * distance(0.0)


@pytest.mark.slow
def test_feature_texture_loss(make_trainer, vgg_file):
    vgg = VGGFeatures(vgg_file, TEXTURE_LAYERS)

    def distance(weight):
        trainer = at_last_scale(make_trainer((1, 1, 60), vgg, {"feature_texture": weight}))
        for _ in range(60):
            trainer.iterate()
        sample = trainer.structure.sample(seeded_noise(0))[None]
        maps = (vgg(image) for image in (sample, (trainer.reals[2] + 1) / 2))
        heights = torch.linspace(-1, 1, 24)
        return float(FeatureWasserstein()(*maps, torch.Generator().manual_seed(0), heights=heights))

    assert distance(20.0) < 0.8 * distance(0.0)


@pytest.mark.slow
def test_projected_discriminator_learns(make_trainer, vgg_file):
    losses = {"adversarial": 0.0, "discriminator": "projected"}
    vgg = VGGFeatures(vgg_file, LossWeights(**losses).layers)
    trainer = at_last_scale(make_trainer((1, 1, 40), vgg, losses))
    values = [trainer.iterate().values["critic"] for _ in range(40)]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])


def test_narrow_images_with_vgg(structure_request, vgg_file, tmp_path):
    """32 x 5 pixels at the last scale, 12 x 1 at the first: too small for VGG unless enlarged."""
    Image.effect_noise((128, 20), 80).convert("RGB").save(tmp_path / "long.png")
    request = structure_request(iterations=(2,), vgg=vgg_file, **ALL_LOSSES)
    train(tmp_path / "long.png", tmp_path / "s", request)
    assert read_structure(tmp_path / "s").base_size == (5, 32)


def test_resume_with_vgg(photo, structure_request, vgg_file, tmp_path):
    request = structure_request(vgg=vgg_file, **ALL_LOSSES)
    whole = train(photo, tmp_path / "whole", request)
    with pytest.raises(Interrupted):
        train(photo, tmp_path / "cut", request, stop_after(3, 2))
    resumed = train(photo, tmp_path / "cut", request, resume=True)
    assert tensors_equal(whole.state_dict(), resumed.state_dict())
    assert resumed.provenance["discriminator"] == "projected"
    assert resumed.provenance["vgg"]["network"] == "VGG-16"


def test_missing_vgg_is_refused(photo, structure_request, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for losses in ({"feature_texture": 1.0}, {"discriminator": "projected"}):
        with pytest.raises(InputError, match="VGG weights: not found"):
            train(photo, tmp_path / "s", structure_request(**losses))
    assert not list(tmp_path.glob("s*"))


def test_only_the_current_scale_trains(make_trainer):
    trainer = make_trainer()
    modules = {"decoder": trainer.structure.decoder, "encoder": trainer.encoder, "critic": trainer.discriminator}
    modules |= {f"block{m}": block for m, block in enumerate(trainer.structure.blocks, 1)}
    expected = [{"decoder", "encoder"}, {"decoder", "encoder", "block1"}, {"block2", "critic"}]
    for moving in expected:
        trainer.begin()
        before = {name: [p.clone() for p in module.parameters()] for name, module in modules.items()}
        trainer.iterate()
        moved = {
            name
            for name, module in modules.items()
            if any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
        }
        assert moved == moving
        trainer.end()


def test_base_learning_rate_decays(make_trainer):
    trainer = make_trainer()
    rates = []
    for _ in range(2):
        trainer.begin()
        rates.append([group["lr"] for group in trainer._optimisations[0].adam.param_groups])
        trainer.end()
    assert rates[0] == [5e-4]
    assert rates[1] == pytest.approx([5e-4, 1e-4])


def test_new_block_copies_the_previous_one(make_trainer):
    first, second_block = (block.state_dict() for block in at_last_scale(make_trainer()).structure.blocks)
    assert tensors_equal(first, second_block)


def test_sigma_scales_with_the_error_below(make_trainer):
    usual, ten = (at_last_scale(make_trainer(sigma=sigma)).structure for sigma in (0.05, 0.5))
    assert 0 < usual.sigmas[2] < 0.05 * 2
    assert ten.sigmas[2] == pytest.approx(10 * usual.sigmas[2].item(), rel=1e-4)


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_gan_block_becomes_its_ema(make_trainer, ema):
    """At first the EMA is a plain mean, so that the initial weights do not count. A longer run shows the weights."""
    short, longer = (at_last_scale(make_trainer((1, 1, count), ema=ema)) for count in (6, 7))
    assert tensors_equal(short.structure.state_dict(), longer.structure.state_dict())
    mean = [torch.zeros_like(p) for p in longer.structure.blocks[1].parameters()]
    for count in range(1, 7):
        short.iterate()
        longer.iterate()
        for value, weight in zip(mean, longer.structure.blocks[1].parameters(), strict=True):
            value.lerp_(weight.detach(), max(1 - ema, 1 / count))
    blocks = (trainer.structure.blocks[1].parameters() for trainer in (short, longer))
    for value, left, last in zip(mean, *blocks, strict=True):
        assert torch.equal(left, value)
        assert torch.equal(left, last) == (not ema)


def test_gradient_penalty_is_per_pixel(make_trainer, monkeypatch):
    trainer = make_trainer()
    # A gradient of 2 in the first channel of every pixel: (2 - 1)^2.
    monkeypatch.setattr(
        trainer.discriminator, "input_gradient", lambda x: x * 0 + torch.tensor([2.0, 0, 0]).view(3, 1, 1)
    )
    real, fake = torch.rand(1, 3, 5, 6), torch.rand(1, 3, 5, 6)
    assert trainer.gan.penalty(real, fake, trainer.rng).item() == pytest.approx(1.0)


def test_resume_refuses_other_settings(photo, structure_request, tmp_path):
    with pytest.raises(Interrupted):
        train(photo, tmp_path / "s", structure_request(), stop_after(2, 1))
    with pytest.raises(ResumeError, match="unfinished"):
        train(photo, tmp_path / "s", structure_request())
    with pytest.raises(ResumeError, match="seed = 0, not 5"):
        train(photo, tmp_path / "s", structure_request(seed=5), resume=True)
    Image.new("RGB", (64, 48)).save(photo)
    with pytest.raises(ResumeError, match="photo"):
        train(photo, tmp_path / "s", structure_request(), resume=True)


def test_refusals_are_one_line(photo, structure_request, tmp_path):
    refusals = [
        ({"iterations": (0,)}, UsageError, r"iterations = \[0\]"),
        ({"iterations": (1, 2)}, UsageError, "have 3 scales"),
        ({"precision": "int8"}, UsageError, "precision = 'int8'"),
        ({"batch": 0}, UsageError, "batch = 0"),
        ({"sigma": -0.1}, UsageError, "sigma = -0.1"),
        ({"sigma": math.inf}, UsageError, "sigma = inf"),
        ({"ema": 1.0}, UsageError, "ema = 1.0"),
        ({"ema": -0.1}, UsageError, "ema = -0.1"),
        ({"checkpoint_every": 0}, UsageError, "checkpoint_every = 0"),
        ({"base_width": 256}, InputError, "64 px wide"),
        ({"vae_texture": -1.0}, UsageError, "vae_texture = -1.0"),
        ({"vae_coherence": math.inf}, UsageError, "vae_coherence = inf"),
        ({"texture": math.nan}, UsageError, "texture = nan"),
        ({"detail": -1.0}, UsageError, "detail = -1.0"),
        ({"feature_texture": math.inf}, UsageError, "feature_texture = inf"),
        ({"adversarial": -0.5}, UsageError, "adversarial = -0.5"),
        ({"discriminator": "vgg"}, UsageError, "'vgg': unknown; use one of wgan, projected"),
    ]
    for change, error, message in refusals:
        with pytest.raises(error, match=message) as refusal:
            train(photo, tmp_path / "s", structure_request(**change))
        assert "\n" not in str(refusal.value), change
    for out, message in ((tmp_path / "none" / "s", "no such folder"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=message):
            train(photo, out, structure_request())


def test_default_networks_are_the_papers():
    assert Config() == Config(last=9, last_vae=3, coordinates=True, padding="zeros", channels=64, latent=128, layers=5)
