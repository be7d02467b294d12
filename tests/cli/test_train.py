"""The commands of engine train: from words to files, and refusals of one line."""

import re
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.cli.app import main
from engine.cli.train import ProgressReporter
from engine.model.bundle import load, open_structure
from engine.model.weight_files import WeightFile
from engine.training.photo import write_row
from engine.training.preset import parse, preset_text, read_preset
from engine.training.run.events import Forecast, Forecasted, IterationDone, ScaleStarted, TrainingStarted


def run(*words):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return exit_.value.code or 0


def test_sr(large_photo, start_file, structure_file, config, tmp_path, capsys):
    out = tmp_path / "sr.safetensors"
    words = ("train", "sr", large_photo, "--out", out, "--config", config, "--start", start_file)
    assert run(*words, "--structure", structure_file, "--device", "cpu", "--precision", "fp32", "--sigma", "0.02") == 0
    printed = capsys.readouterr()
    assert f"engine model build --sr {out}" in printed.out
    assert "held-out strip, bicubic / start / now: PSNR" in printed.err
    assert "PSNR of reconstructions" in printed.err
    assert "training: 100%" in printed.err
    model = tmp_path / "model.safetensors"
    assert run("model", "build", "--structure", structure_file, "--sr", out, "--out", model) == 0


@pytest.mark.usefixtures("narrow_structure")
def test_whole_model(start_file, config, picture, tmp_path, capsys):
    text = config.read_text()
    config.write_text(re.sub(r"(?<=^iterations = )\[.*\]", "[2, 2, 2]", text, flags=re.MULTILINE))
    photo, out = tmp_path / "photo.png", tmp_path / "model.safetensors"
    write_row([picture(225, 300)], photo)
    words = ("train", photo, "--out", out, "--config", config, "--start", start_file, "--device", "cpu")
    assert run(*words, "--licence", "CC0-1.0") == 0
    printed = capsys.readouterr()
    assert "CC0-1.0" in printed.out
    assert f"logs and samples: {tmp_path / 'model.training'}" in printed.err
    assert "scale 2 of 0 to 2: 32x24, gan" in printed.err
    assert re.search(
        r"^forecast: step 1 about \d+ s, step 2 .*, step 3 .*, in all about \d+ s$", printed.err, re.MULTILINE
    )
    assert re.search(r"^training: 100%, \S+ elapsed, 0:00 left, step 3: iteration 2 of 2$", printed.err, re.MULTILINE)
    assert len(load(out).stages) == 3
    assert run(*words) == 4
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.usefixtures("narrow_structure")
def test_refusals_leave_nothing(start_file, config, picture, tmp_path, capsys):
    text = re.sub(r"(?m)^iterations = \[.*?\]", "iterations = [2, 2, 2]", config.read_text())
    config.write_text(text)
    with_vgg, distil = tmp_path / "vgg.toml", tmp_path / "distil.toml"
    with_vgg.write_text(text.replace("perceptual = 0.0", "perceptual = 1.0"))
    distil.write_text(preset_text("distil").replace("crop = 128 ", "crop = 32 "))
    photo, garbage, folder = tmp_path / "photo.png", tmp_path / "garbage.pth", tmp_path / "empty"
    write_row([picture(225, 300)], photo)
    garbage.write_text("no weights")
    folder.mkdir()
    usual, taught = ("--config", config), ("--config", distil, "--teacher", start_file)
    nothing, little = ("--start", "nothing"), ("--start", start_file, "--memory", "1MB")
    vgg = ("--start", start_file, "--config", with_vgg, "--vgg", garbage)
    refusals = [
        ((), (*usual, *nothing), 4, "nothing: no such weights; use realsr, x4plus, scratch"),
        ((), (*usual, *little), 3, "step 2: an iteration takes about .* allow more by --memory"),
        ((), vgg, 4, "garbage.pth: damaged"),
        (("sr",), (*usual, *nothing), 4, "nothing: no such weights"),
        (("sr",), (*usual, *little), 3, "step 2: an iteration takes about .* smaller batch .* allow more by --memory"),
        (("sr",), vgg, 4, "garbage.pth: damaged"),
        (("distil",), (*taught, *nothing), 4, "nothing: no such weights"),
        (("distil",), (*taught, *little), 3, "distillation: an iteration takes about"),
    ]
    for command, words, code, message in refusals:
        assert run("train", *command, photo, "--out", folder / "x.safetensors", "--device", "cpu", *words) == code
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("engine: ")]
        assert re.search(message, line), (command, words, line)
        assert list(folder.iterdir()) == [], (command, words)


class Recorder:
    """A meter that keeps what it is told."""

    def __init__(self):
        self.calls = []

    def advance(self, amount, note="", left=None):
        self.calls.append((round(amount, 6), note, round(left, 6)))


def test_progress_names_each_number(capsys):
    bar = Recorder()
    reporter = ProgressReporter(bar, torch.device("cuda"))
    parts = (
        Forecast(name="step 1", iterations=(10, 10), seconds=(1.0, 2.0)),
        Forecast(name="step 2", iterations=(100,), seconds=(0.5,), preparation=20.0),
    )
    reporter(Forecasted(parts))
    reporter(ScaleStarted(1, 2, (12, 16), "gan", 0.1, 0, 10))
    reporter(IterationDone(1, 2, 5, 10, {}, 2.0, 20.0))  # twice as slow as the forecast: 10 s here, 70 s later
    reporter(TrainingStarted("step 2", 0, 100))
    reporter(IterationDone(0, 1, 100, 100, {}, 0.5, 0.0))
    assert capsys.readouterr().err.splitlines() == [
        "forecast, not yet measured on a GPU: step 1 about 30 s, step 2 about 70 s, in all about 2 min",
        "scale 1 of 0 to 1: 16x12, gan",
        "step 2: 100 iterations",
    ]
    assert bar.calls == [
        (0.2, "step 1 scale 1 of 0 to 1: iteration 5 of 10", 160.0),
        (0.8, "step 2: iteration 100 of 100", 0.0),
    ]


def test_distil(large_photo, start_file, tmp_path, capsys):
    config = tmp_path / "distil.toml"
    config.write_text(preset_text("distil").replace("crop = 128 ", "crop = 32 "))
    out = tmp_path / "small.safetensors"
    names = ("--teacher", start_file, "--start", start_file, "--blocks", 1, "--out", out, "--config", config)
    assert run("train", "distil", large_photo, *names, "--iterations", 2, "--device", "cpu") == 0
    assert "MB" in capsys.readouterr().out
    assert not any(key.startswith("body.1.") for key in load_file(out))


def test_conversions_are_told_first(picture, start_file, config, tmp_path, capsys):
    write_row([picture(225, 300)], tmp_path / "plain.png")
    with Image.open(tmp_path / "plain.png") as image:
        image.convert("RGBA").save(tmp_path / "alpha.png")
    photo, out = tmp_path / "alpha.png", tmp_path / "missing" / "out.safetensors"  # refused after the notes
    note, chosen = f"{photo}: transparency is flattened on white", ("--config", config, "--device", "cpu")
    for words in (("train", photo), ("train", "structure", photo), ("train", "sr", photo)):
        assert run(*words, "--out", out, *chosen) == 4
        first, *others = capsys.readouterr().err.splitlines()
        assert first == note, words
        assert note not in others
    distilled = (
        "train",
        "distil",
        tmp_path,
        "--teacher",
        start_file,
        "--start",
        "none.pth",
        "--out",
        tmp_path / "out.safetensors",
    )
    assert run(*distilled, "--device", "cpu") == 4
    assert capsys.readouterr().err.splitlines().count(note) == 1


def test_default_preset_with_vgg(large_photo, start_file, vgg_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = ("train", "sr", large_photo, "--out", tmp_path / "sr.safetensors", "--start", start_file, "--size", 40)
    assert run(*words) == 4
    assert "preset quick; for better texture get VGG weights: engine weights fetch vgg16" in capsys.readouterr().err
    assert run(*words, "--vgg", vgg_file) == 4
    assert "preset quick-vgg\n" in capsys.readouterr().err
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "vgg16-397923af.pth").symlink_to(vgg_file)
    monkeypatch.setattr(WeightFile, "check", lambda self, path: None)
    assert run(*words) == 4
    assert "preset quick-vgg\n" in capsys.readouterr().err


def test_default_preset_of_step_1(picture, vgg_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    write_row([picture(192, 256)], tmp_path / "photo.png")
    out = tmp_path / "s.safetensors"
    out.with_name("s.safetensors.checkpoint").touch()  # an unfinished run, refused before any training
    words = ("train", "structure", tmp_path / "photo.png", "--out", out, "--device", "cpu")
    for extra, line in (
        ((), "preset quick; for better texture get VGG weights: engine weights fetch vgg16"),
        (("--vgg", vgg_file), "preset quick-vgg\n"),
    ):
        assert run(*words, *extra) == 4
        assert line in capsys.readouterr().err
    assert run(*words, "--preset", "quick", "--config", "x.toml") == 2
    assert "--preset quick: excludes --config" in capsys.readouterr().err


@pytest.mark.usefixtures("narrow_structure")
def test_structure(photo, config, tmp_path, capsys, monkeypatch):
    """Options replace the values of the preset."""
    monkeypatch.setattr("engine.cli.train.BASE_WIDTH", 32)
    out = tmp_path / "s.safetensors"
    words = ("train", "structure", photo, "--out", out, "--config", config, "--device", "cpu", "--precision", "fp32")
    assert run(*words, "--iterations", "1", "--ema", "0.5", "--seed", "3") == 0
    printed = capsys.readouterr()
    assert f"engine model build --structure {out}" in printed.out
    assert "training: 100%" in printed.err
    provenance = open_structure(out).provenance
    assert (provenance["iterations"], provenance["ema"], provenance["seed"]) == ([1, 1, 1], 0.5, 3)
    assert run(*words, "--ema", "1.5") == 2
    assert "ema = 1.5: out of range" in capsys.readouterr().err


def test_printed_presets_are_read_again(capsys):
    for name in ("quick", "quick-vgg", "paper-swinir"):
        assert run("train", "preset", name) == 0
        assert parse(capsys.readouterr().out, "stdout") == read_preset(name)


def test_refusals_are_one_line(large_photo, start_file, config, tmp_path, capsys):
    refusals = [
        (("--preset", "slow"), 2, "--preset slow: unknown; use one of distil"),
        (("--preset", "quick", "--config", "x.toml"), 2, "--preset quick: excludes --config"),
        (("--config", "none.toml"), 4, "none.toml: cannot be read"),
        (("--memory", "lots"), 2, "lots"),
        (("--memory", "1MB"), 3, "smaller batch"),
        (("--step", "1"), 2, "--step"),
        (("--size", "5000"), 4, "--size 5000: too large .* use at most 240"),
        (("--structure", "none.safetensors"), 4, "none.safetensors"),
        (("--blocks", "0"), 2, "--blocks 0"),
        (("--iterations", "0"), 2, "iterations = 0"),
        (("--device", "abacus"), 2, "--device abacus"),
    ]
    out = tmp_path / "sr.safetensors"
    for words, code, message in refusals:
        preset = () if "--preset" in words or "--config" in words else ("--config", config)
        device = () if "--device" in words else ("--device", "cpu")
        assert run("train", "sr", large_photo, "--out", out, "--start", start_file, *device, *preset, *words) == code, (
            words
        )
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("engine: ")]
        assert re.search(message, line), line
        assert not out.exists()


def test_photograph_is_required(capsys):
    assert run("train") in (0, 2)
    assert run("train", "none.jpg", "--out", "model.safetensors") == 4
    assert "none.jpg: no such photograph" in capsys.readouterr().err


def test_missing_tensorboard(large_photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ("train", "sr", large_photo, "--out", tmp_path / "sr.safetensors", "--device", "cpu")
    assert run(*words, "--tensorboard", tmp_path / "board") == 2
    assert "pip install 'ourgan-engine[tensorboard]'" in capsys.readouterr().err
