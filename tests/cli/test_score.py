"""``engine score``: output, refusals and remaining files."""

import json
import signal

import numpy as np
import pytest
import zarr
from PIL import Image

from engine.errors import MAX_MESSAGE
from engine.job import Job
from engine.metrics import weights
from engine.model.bundle import load
from engine.model.weight_files import weights_folder
from engine.plan.request import Request

RENDER = "--size 128x96 --stages 2 --tile 16 --overlap 4 --precision fp32 --executor tiles"


@pytest.fixture(scope="module")
def measured(model_file):
    """Measure the model once; the measurement is cached."""
    from pathlib import Path

    Job.prepare(load(model_file), Request(size=(128, 96), overlap="4", stages=2, precision="fp32"), Path("out.zarr"))
    return model_file


@pytest.fixture
def folder(tmp_path, monkeypatch, measured, picture):
    """Working folder with a model, a photograph of 128x96 and two samples of that size; no trained weights anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)  # Python caches the first value
    (tmp_path / "model.safetensors").symlink_to(measured)
    (tmp_path / "samples").mkdir()
    for name, seed in (("photo.png", 0), ("samples/a.png", 1), ("samples/b.png", 2)):
        pixels = (picture(96, 128, seed=seed).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def engine(folder, call):
    """Run the command line in the working folder."""
    return call


def test_folder_against_photograph(engine):
    code, out, err = engine("score --real photo.png samples")
    assert code == 0
    assert "2 samples of 128x96 against photo.png" in out
    for measure in ("diversity", "RMS difference", "colour of rows", "patches at 1/1", "border, left", "peak memory"):
        assert measure in out
    assert "SIFID" not in out
    assert "SIFID is left out: inception_v3_google-0cc3c7bd.pth is missing" in err
    assert "LPIPS is left out: alexnet-owt-7be5be79.pth is missing" in err


def test_stdout_is_json_alone(engine):
    code, out, _ = engine("score --real photo.png samples samples/a.png --json")
    assert code == 0
    result = json.loads(out)
    assert [s["name"] for s in result["samples"]] == ["a.png", "b.png", "a.png"]
    assert result["samples"][0] == result["samples"][2]
    assert result["samples"][0]["colour_profile"] > 0
    assert result["mean"]["sifid"] is None
    assert len(result["missing"]) >= 2
    assert result["host_peak"] > 0


def test_free_metrics_mention_no_weights(engine):
    code, out, err = engine("score --real photo.png samples --metrics free")
    assert (code, "left out" in err) == (0, False)
    assert "colour of rows" in out


def test_requested_metric_without_weights_is_refused(engine, folder):
    for metrics in ("sifid", "lpips", "sifid,lpips", "all"):
        code, out, err = engine(
            f"score --against photo.png --model model.safetensors --samples 2 {RENDER} --metrics {metrics}"
        )
        assert (code, out) == (4, ""), metrics
        for name in ("sifid", "lpips") if metrics == "all" else metrics.split(","):
            for file in weights.FILES[name]:
                if file.find(None) is None and len(err) < MAX_MESSAGE:  # longer messages are cut
                    assert f"{next(iter(file.names))} is missing" in err
        assert "; run engine weights fetch" in err or f" into {weights_folder()}" in err
        assert "--weights-dir" in err
        assert err.count("\n") == 1
        assert list((folder / "temporary").iterdir()) == []


def test_photograph_is_resampled_to_height(engine, folder, picture):
    pixels = (picture(48, 64).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "small.png")
    code, out, err = engine("score --real small.png samples --metrics free --json")
    assert code == 0
    assert "small.png: resampled from 64x48 to 128x96, the samples' height" in err
    assert json.loads(out)["photograph_size"] == [96, 128]


def test_against_reference(engine):
    code, out, _ = engine("score --reference photo.png photo.png samples/a.png")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    assert lines["photo.png"][1:] == ["equal", "equal", "1.0000", "1.0000"]
    assert lines["a.png"][2] == "dB"
    assert 5 < float(lines["a.png"][1]) < 30
    result = json.loads(engine("score --reference photo.png photo.png samples --json")[1])
    assert [image["name"] for image in result["images"]] == ["photo.png", "a.png", "b.png"]
    assert result["images"][0]["psnr_rgb"] is None
    assert f"{result['images'][1]['psnr_rgb']:.2f}" == lines["a.png"][1]


def test_conversions_are_told_once(engine, folder):
    with Image.open(folder / "photo.png") as image:
        image.convert("RGBA").save(folder / "alpha.png")
    note = "alpha.png: transparency is flattened on white"
    for line in ("score --reference photo.png alpha.png", "score --real alpha.png samples --metrics free"):
        code, _, err = engine(line)
        assert (code, err.splitlines().count(note)) == (0, 1), line


def test_rendered_samples_are_deleted(engine, folder):
    before = sorted(folder.rglob("*"))
    code, out, err = engine(f"score --against photo.png --model model.safetensors --samples 3 {RENDER}")
    assert code == 0, err
    assert "3 samples of 128x96 against photo.png" in out
    assert sorted(folder.rglob("*")) == before


def test_kept_samples_are_reused(engine, folder):
    line = f"score --against photo.png --model model.safetensors --samples 2 --seed 5 {RENDER} --keep kept --metrics free --json"
    code, out, err = engine(line)
    assert code == 0, err
    assert sorted(p.name for p in (folder / "kept").iterdir()) == ["sample-5.zarr", "sample-6.zarr"]
    assert engine(f"render model.safetensors --out direct.zarr --seed 6 {RENDER}")[0] == 0
    direct, kept = (
        zarr.open_group(folder / store, mode="r")["0"][:] for store in ("direct.zarr", "kept/sample-6.zarr")
    )
    assert direct.std() > 1
    np.testing.assert_array_equal(kept, direct)
    stamp = (folder / "kept" / "sample-5.zarr" / "0" / "c" / "0" / "0" / "0").stat().st_mtime_ns
    again = json.loads(engine(line)[1])
    assert (folder / "kept" / "sample-5.zarr" / "0" / "c" / "0" / "0" / "0").stat().st_mtime_ns == stamp
    first = json.loads(out)
    images = json.loads(engine("score --real photo.png kept --metrics free --json")[1])
    for other in (again, images):
        assert other["samples"] == first["samples"]
        assert other["diversity"] == first["diversity"]
    assert first["base"] == [6, 8]  # recorded by the store
    assert first["diversity"]["pixels"] > 0


def test_kept_samples_of_other_request_are_refused(engine):
    line = f"score --against photo.png --model model.safetensors --samples 1 {RENDER} --keep kept --metrics free"
    assert engine(line)[0] == 0
    code, _, err = engine(line.replace("--overlap 4", "--overlap 8"))
    assert code == 4
    assert "sample-0.zarr: made with another plan" in err


def test_interrupted_command_continues_with_kept_samples(engine, folder):
    def stop(number, frame):
        raise KeyboardInterrupt

    line = f"score --against photo.png --model model.safetensors --samples 500 {RENDER} --metrics free"
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for keep, words in (
            ("", "engine: stopped: nothing is kept"),
            ("--keep kept", "kept keeps the samples; repeat the command"),
        ):
            signal.setitimer(signal.ITIMER_REAL, 4)
            code, out, err = engine(f"{line} {keep}")
            assert (code, out) == (130, "")
            assert words in err
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert list((folder / "temporary").iterdir()) == []
    assert (folder / "kept" / "sample-0.zarr").exists()
    code, out, err = engine(f"{line.replace('500', '2')} --keep kept")
    assert code == 0, err
    assert "2 samples of 128x96" in out


REFUSALS = (
    ("score", 2, "give either --real PHOTOGRAPH"),
    ("score samples", 2, "give either --real PHOTOGRAPH"),
    ("score --real photo.png --reference photo.png samples", 2, "give either --real PHOTOGRAPH"),
    ("score --real photo.png", 2, "no images; name pictures, stores or folders"),
    ("score --real photo.png samples --model model.safetensors", 2, "leave the images and --reference out"),
    ("score --reference photo.png --model model.safetensors", 2, "leave the images and --reference out"),
    ("score --real photo.png samples --keep kept", 2, "--keep kept: there are no rendered samples"),
    ("score --real photo.png samples --size 64x64", 2, "options of a render need --model"),
    ("score --real photo.png --model model.safetensors --samples 0", 2, "--samples 0: must be at least 1"),
    ("score --real photo.png --model model.safetensors --init photo.png", 2, "--init and --roi"),
    ("score --real photo.png --model model.safetensors --roi 0,0,8,8", 2, "--init and --roi"),
    ("score --real photo.png --model model.safetensors --seed 18446744073709551615 --samples 2", 2, "--seed 18446"),
    (
        "score --real photo.png samples --metrics beauty",
        2,
        "--metrics beauty: unknown; use available, free, all, or sifid",
    ),
    ("score --real photo.png samples --metrics sifid,all", 2, "--metrics all"),
    ("score --real photo.png samples --device abacus", 2, "--device abacus: not a device of this machine; use cpu"),
    ("score --real nothing.png samples", 4, "nothing.png: no such picture or store"),
    ("score --real photo.png nothing.png", 4, "nothing.png: no such picture or store"),
    ("score --real photo.png torch", 4, "torch: no such picture"),
    ("score --reference photo.png small.png", 4, "small.png: no such picture"),
    ("score --real photo.png --model nothing.safetensors", 4, "nothing.safetensors: no such file"),
)


def test_refusals_are_one_line(engine):
    for line, code, words in REFUSALS:
        arguments = f"{line} --metrics free" if "--metrics" not in line and "--ref" not in line else line
        result, out, err = engine(arguments)
        assert (result, out) == (code, ""), line
        assert words in err, line
        assert err.count("\n") == 1, line
