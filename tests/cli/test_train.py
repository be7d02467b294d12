"""The train commands: from words to files, with one line where something is wrong."""

import re
import sys

import pytest
from safetensors.torch import load_file

from engine.archs.hpvaegan import Config
from engine.cli.app import main
from engine.model.bundle import load
from engine.training import train as whole
from engine.training.photo import write_row
from engine.training.preset import parse, preset_text, read_preset
from engine.training.sr import train as sr


def run(*words):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return exit_.value.code or 0


@pytest.fixture
def config(tmp_path):
    """The quick preset at a size that trains in a second, as a file."""
    text = preset_text("quick")
    for old, new in {
        "iterations = 400": "iterations = 2", "crop = 128 ": "crop = 32 ", "reconstructions = 8": "reconstructions = 1",
        "samples = 8": "samples = 1", "discriminator_channels = 32": "discriminator_channels = 8",
        "gan_from = 50": "gan_from = 0", "checkpoint_every = 50": "checkpoint_every = 1", "held_out = 0.1": "held_out = 0.25",
    }.items():  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return path


def test_sr(large_photo, start_file, structure_file, config, tmp_path, capsys):
    out = tmp_path / "sr.safetensors"
    words = ("train", "sr", large_photo, "--out", out, "--config", config, "--start", start_file)
    assert run(*words, "--structure", structure_file, "--device", "cpu", "--precision", "fp32", "--sigma", "0.02") == 0
    said = capsys.readouterr()
    assert f"engine model build --sr {out}" in said.out
    assert "held-out strip, bicubic / start / now: PSNR" in said.err
    assert "PSNR of reconstructions" in said.err
    assert "training: 100%" in said.err
    model = tmp_path / "model.safetensors"
    assert run("model", "build", "--structure", structure_file, "--sr", out, "--out", model) == 0


def test_a_whole_model(start_file, config, picture, tmp_path, capsys, monkeypatch):
    """Step 1 of three small scales that end at 32 pixels, so that steps end at 128, 512 and 2048."""
    small = {"config": Config(last=2, last_vae=1, channels=8, latent=6, layers=1), "base_width": 32, "least_width": 12}
    train_structure = whole.train_structure
    monkeypatch.setattr(whole, "train_structure", lambda *args, **options: train_structure(*args, **options | small))
    monkeypatch.setattr(whole, "BASE_WIDTH", 32)
    monkeypatch.setattr(sr, "BASE_WIDTH", 32)
    text = config.read_text()
    config.write_text(re.sub(r"(?<=^iterations = )\[.*\]", "[2, 2, 2]", text, flags=re.MULTILINE))
    photo, out = tmp_path / "photo.png", tmp_path / "model.safetensors"
    write_row([picture(225, 300)], photo)
    words = ("train", photo, "--out", out, "--config", config, "--start", start_file, "--device", "cpu")
    assert run(*words, "--licence", "CC0-1.0") == 0
    said = capsys.readouterr()
    assert "CC0-1.0" in said.out
    assert f"kept in {tmp_path / 'model.training'}" in said.err
    assert "training: 100%" in said.err
    assert len(load(out).stages) == 3
    assert run(*words) == 4
    assert "holds another run" in capsys.readouterr().err


def test_distil(large_photo, start_file, tmp_path, capsys):
    config = tmp_path / "distil.toml"
    config.write_text(preset_text("distil").replace("crop = 128 ", "crop = 32 "))
    out = tmp_path / "small.safetensors"
    names = ("--teacher", start_file, "--start", start_file, "--blocks", 1, "--out", out, "--config", config)
    assert run("train", "distil", large_photo, *names, "--iterations", 2, "--device", "cpu") == 0
    assert "MB" in capsys.readouterr().out
    assert not any(key.startswith("body.1.") for key in load_file(out))


def test_the_better_preset_is_chosen_where_vgg_is(large_photo, start_file, vgg_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = ("train", "sr", large_photo, "--out", tmp_path / "sr.safetensors", "--start", start_file, "--size", 40)
    assert run(*words) == 4
    assert "preset quick: better texture with VGG weights, --vgg FILE" in capsys.readouterr().err
    assert run(*words, "--vgg", vgg_file) == 4
    assert "preset quick-vgg\n" in capsys.readouterr().err
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "vgg16-397923af.pth").symlink_to(vgg_file)
    assert run(*words) == 4
    assert "preset quick-vgg\n" in capsys.readouterr().err


def test_step_1_takes_the_better_preset_too(picture, vgg_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    write_row([picture(192, 256)], tmp_path / "photo.png")
    out = tmp_path / "s.safetensors"
    out.with_name("s.safetensors.checkpoint").touch()  # an unfinished run, which is refused before anything is trained
    words = ("train", "structure", tmp_path / "photo.png", "--out", out, "--device", "cpu")
    for extra, said in (
        ((), "preset quick: better texture with VGG weights, --vgg FILE"),
        (("--vgg", vgg_file), "preset quick-vgg\n"),
    ):
        assert run(*words, *extra) == 4
        assert said in capsys.readouterr().err
    assert run(*words, "--preset", "quick", "--config", "x.toml") == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quick", "quick-vgg", "paper-swinir"])
def test_a_printed_preset_is_read_again(name, capsys):
    assert run("train", "preset", name) == 0
    assert parse(capsys.readouterr().out, "stdout") == read_preset(name)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--preset", "slow"), 2, "there are distil"),
        (("--preset", "quick", "--config", "x.toml"), 2, "exclude each other"),
        (("--config", "none.toml"), 4, "none.toml: cannot be read"),
        (("--memory", "lots"), 2, "--memory lots"),
        (("--memory", "1MB"), 3, "smaller batch"),
        (("--step", "1"), 2, "--step"),
        (("--size", "5000"), 4, "take at most 240"),
        (("--structure", "none.safetensors"), 4, "none.safetensors"),
        (("--blocks", "0"), 2, "--blocks 0"),
        (("--iterations", "0"), 2, "iterations = 0"),
    ],
)
def test_wrong_words_are_one_line(large_photo, start_file, config, tmp_path, capsys, words, code, message):
    given = () if "--preset" in words or "--config" in words else ("--config", config)
    out = tmp_path / "sr.safetensors"
    names = ("--out", out, "--start", start_file, "--device", "cpu")
    assert run("train", "sr", large_photo, *names, *given, *words) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("engine: ")]
    assert message in line
    assert not out.exists()


def test_train_alone_wants_a_photograph(capsys):
    assert run("train") in (0, 2)
    assert run("train", "none.jpg", "--out", "model.safetensors") == 4
    assert "none.jpg: no such photograph" in capsys.readouterr().err


def test_tensorboard_is_asked_for_only_where_it_is_installed(large_photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ("train", "sr", large_photo, "--out", tmp_path / "sr.safetensors", "--device", "cpu")
    assert run(*words, "--tensorboard", tmp_path / "board") == 2
    assert "pip install 'ourgan-engine[tensorboard]'" in capsys.readouterr().err
