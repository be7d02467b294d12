"""Presets are complete and right; a faulty file is refused in one line."""

import dataclasses

import pytest

from engine.errors import InputError, UsageError
from engine.training.preset import parse, preset_names, preset_text, read_file, read_preset
from engine.training.sr.recipe import Recipe


def test_presets_of_the_paper_and_ours():
    assert preset_names() == ("distil", "paper-esrgan", "paper-swinir", "quick", "quick-vgg")
    esrgan, swinir = read_preset("paper-esrgan"), read_preset("paper-swinir")
    # Appendix H.2 and H.3.
    assert (esrgan.sr.iterations, esrgan.sr.batch, esrgan.sr.crop) == (100_000, 16, 128)
    assert (swinir.sr.iterations, swinir.sr.batch, swinir.sr.crop) == (130_000, 20, 96)
    assert (esrgan.sr.perceptual, esrgan.sr.pixel, esrgan.sr.adversarial) == (1.0, 0.01, 0.005)
    assert (swinir.sr.perceptual, swinir.sr.pixel, swinir.sr.adversarial) == (1.0, 1.0, 0.1)
    assert (esrgan.sr.gan, esrgan.sr.discriminator, esrgan.sr.degradation) == ("ragan", "vgg", "bicubic")
    assert (swinir.sr.gan, swinir.sr.discriminator, swinir.sr.degradation) == ("vanilla", "unet", "bsrgan")
    for preset in (esrgan, swinir):
        assert (preset.sr.learning_rate, preset.sr.decay, preset.sr.betas) == (1e-4, 0.5, (0.9, 0.999))
        assert preset.sr.milestones == (30_000, 60_000, 90_000)
        assert (preset.sr.sigma, preset.sr.render_sigma, preset.sr.noise) == (0.1, 0.1, "fixed")
        assert preset.structure.iterations == (5000,) * 10
        assert (preset.structure.batch, preset.structure.padding, preset.structure.coordinates) == (2, "zeros", True)
    assert read_preset("quick").structure is not None
    assert read_preset("distil").structure is None


def test_presets_are_complete():
    """Every value has its line."""
    for name in preset_names():
        text = preset_text(name)
        for field in dataclasses.fields(Recipe):
            assert f"\n{field.name} = " in text, name


def test_edited_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(preset_text("quick").replace("adversarial = 0.1", "adversarial = 0"))
    assert read_file(path).sr == read_preset("quick").sr.replace(adversarial=0.0)


def test_step_tables():
    """A step's table changes that step; ``replace`` changes all steps."""
    preset = parse(preset_text("quick") + "\n[sr.step3]\niterations = 7\n", "mine.toml")
    usual = read_preset("quick").sr
    assert [preset.step(step) for step in (2, 3, 4)] == [usual, usual.replace(iterations=7), usual]
    assert {preset.replace(iterations=5).step(step).iterations for step in (2, 3, 4)} == {5}


def test_refusals_are_one_line():
    refusals = [
        ("batch = 4 ", "bach = 4 ", r"\[sr\] bach: unknown setting"),
        ("batch = 4 ", "batch = 4.5 ", "batch = 4.5: wrong type; use a whole number"),
        ("batch = 4 ", "batch = 4.0 ", "batch = 4.0: wrong type; use a whole number"),
        ("batch = 4 ", "batch = true ", "batch = True: wrong type; use a whole number"),
        ("batch = 4 ", "batch = 0 ", "batch = 0: out of range; use a finite number of at least 1"),
        ("flip = true", "flip = 1", "flip = 1: wrong type; use true or false"),
        ("sigma = 0.1", 'sigma = "0.1"', "sigma = '0.1': wrong type; use a number"),
        ('gan = "ragan"', 'gan = "wgan"', "gan = 'wgan': unknown; use one of 'ragan'"),
        ('gan = "ragan"', "gan = 1", "gan = 1: wrong type; use a text"),
        ("betas = [0.9, 0.999]", "betas = 0.9", "betas = 0.9: wrong type; use a list"),
        ("betas = [0.9, 0.999]", "betas = [0.9, true]", r"betas = \[0.9, True\]: wrong type; use a number"),
        ("betas = [0.9, 0.999]", "betas = [0.9]", "two numbers"),
        ("ema = 0.99 ", "ema = 1.0 ", "ema = 1.0"),
        ("chain = 0.5", "chain = 1.5", "chain = 1.5: out of range; use at most 1"),
        ("sigma = 0.1", "sigma = nan", "sigma = nan"),
        ("sigma = 0.1", "sigma = inf", "sigma = inf"),
        ("\ncrop = 128 ", "\n#", r"\[sr\] crop: missing \(1 in all\)"),
        ("[sr]", "[superresolution]", r"\[superresolution\] is not a known table"),
        ("[sr]", "[sr", "not valid TOML"),
        ('padding = "reflect"', 'padding = "wrap"', "padding = 'wrap': unknown; use one of"),
        ("[1500, 1200,", "[0, 1200,", "use numbers of at least 1"),
        ("texture = 60.0", "texture = -1.0", r"\[structure\] texture = -1.0"),
        ("[sr]", "[sr]\nstep3 = 900", r"\[sr.step3\] = 900: expected a table"),
        ("[sr]", "[sr.step3]\ncrops = 64\n[sr]", r"\[sr.step3\] crops: unknown setting"),
        ("[sr]", "[sr.step3]\nema = 1.0\n[sr]", r"\[sr.step3\] ema = 1.0"),
        ("[sr]", "[sr.step1]\nema = 0.9\n[sr]", r"\[sr\] step1: unknown setting"),
    ]
    text = preset_text("quick")
    for old, new, message in refusals:
        assert old in text
        with pytest.raises(InputError, match=message) as error:
            parse(text.replace(old, new), "mine.toml")
        assert "\n" not in str(error.value), new
        assert str(error.value).startswith("mine.toml"), new


def test_unreadable_files_and_unknown_names(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(InputError, match="cannot be read"):
            read_file(path)
    with pytest.raises(UsageError, match="unknown; use one of distil"):
        read_preset("slow")
    with pytest.raises(InputError, match=r"table \[sr\] is missing"):
        parse("[structure]\n", "mine.toml")
    with pytest.raises(InputError, match="expected a table"):
        parse("sr = 3\n", "mine.toml")
