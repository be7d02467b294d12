"""``engine upscale``: many pictures, of which some are broken; chains of models, sizes, formats, and what it never replaces."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from support import small
from support.stores import pixels

from engine import measure
from engine.io.files import temporary_name
from engine.run.stage import Stage

NETWORK = "sr.safetensors"
EXACT = "--precision fp32"
EXTENSIONS = ("png", "jpg", "tif", "webp", "png")
BROKEN = {
    "p03.webp": lambda whole: b"",
    "p10.png": lambda whole: whole[:200],
    "p16.jpg": lambda whole: whole[:150],
    "p22.tif": lambda whole: b"a text",
    "p29.png": lambda whole: whole[:8] + bytes(100),
}


@pytest.fixture
def folder(tmp_path, monkeypatch, model_file):
    """Working folder with a network of x4."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / NETWORK).symlink_to(model_file.parent / NETWORK)
    return tmp_path


@pytest.fixture
def engine(folder, call):
    """Command line in the working folder."""
    return call


@pytest.fixture
def shots(folder):
    """Folder ``shots`` of two whole pictures, a broken one, and a file that is no picture."""
    (folder / "shots").mkdir()
    for name, size in (("a.png", (12, 16)), ("b.jpg", (20, 16)), ("c.png", (9, 9))):
        small.photograph(folder / "shots" / name, *size)
    (folder / "shots" / "c.png").write_bytes((folder / "shots" / "c.png").read_bytes()[:100])
    (folder / "shots" / "notes.txt").write_text("mine")
    return folder / "shots"


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_one_bad_picture_fails_alone(engine, folder, shots):
    code, out, err = engine(f"upscale shots --model {NETWORK} {EXACT} --out large")
    assert code == 1
    assert sorted(contents("large")) == ["a.png", "b.png"]
    assert " megapixels, by sr\n" in out
    assert "print 0.5 x 0.7 cm at 300 dpi" in out
    table = {line.split()[0]: line for line in out.splitlines() if line.startswith("shots/")}
    assert "64x48" in table["shots/a.png"]
    assert table["shots/b.jpg"].rstrip().endswith("written")
    assert "failed: cannot be read as a picture" in table["shots/c.png"]
    assert "warning: shots/c.png: cannot be read as a picture" in err
    assert err.splitlines()[-1] == "engine: 1 of 3 pictures failed, and the others are done; --resume tries these again"
    assert engine(f"render {NETWORK} --init shots/a.png {EXACT} --out a.zarr")[0] == 0
    assert (opened("large/a.png") == pixels(folder / "a.zarr").transpose(1, 2, 0)).all()


def test_what_is_done_is_left(engine, folder, shots):
    """By the request that made it: another picture, scale or quality makes another result."""
    (shots / "c.png").unlink()
    command = f"upscale shots --model {NETWORK} {EXACT} --format jpg --out large"
    assert engine(command)[0] == 0
    before = contents("large")
    code, _, err = engine(command)
    assert (code, err) == (
        4,
        "engine: large/a.jpg: 2 of 2 results exist or are begun; give --resume to keep what is done, or --overwrite to "
        "replace them\n",
    )
    temporary_name(folder / "large" / "b.jpg.work.zarr", "part").mkdir()  # of a run that was killed as it removed it
    done = json.loads(engine(f"{command} --resume --json")[1])["pictures"]
    assert [picture["state"] for picture in done] == ["done before"] * 2
    assert sorted(contents("large")) == ["a.jpg", "b.jpg"]
    small.photograph(shots / "a.png", 12, 20)
    code, out, _ = engine(f"{command} --resume --json")
    assert code == 1
    first, second = json.loads(out)["pictures"]
    assert (first["state"], second["state"]) == ("failed", "done before")
    assert first["error"].startswith("large/a.jpg: exists, and is no result of these pictures and options")
    for options in ("--scale 3", "--quality 80", "--dpi 72"):
        code, out, _ = engine(f"{command} --resume --json {options}")
        assert (code, {p["state"] for p in json.loads(out)["pictures"]}) == (1, {"failed"})
    assert contents("large") == before
    states = [p["state"] for p in json.loads(engine(f"{command} --resume --overwrite --json")[1])["pictures"]]
    assert states == ["written", "done before"]
    assert opened("large/a.jpg").shape == (48, 80, 3)
    assert contents("large")["b.jpg"] == before["b.jpg"]


def test_interrupted_picture_continues_by_shards(engine, folder, shots, monkeypatch):
    """Ctrl-C in the second picture: the first one is done, and the shards of the second are kept."""
    small.photograph(shots / "b.jpg", 80, 64)
    options = f"{EXACT} --executor tiles --tile 16 --overlap 4 --scale 4 --format webp --quality 80"
    command = f"upscale shots/a.png shots/b.jpg --model {NETWORK} {options}"
    assert engine(f"{command} --out whole")[0] == 0
    count, real = 0, Stage.run

    def run(*arguments):
        nonlocal count
        count += 1
        if count == 9:
            monkeypatch.setattr(Stage, "run", real)
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Stage, "run", run)
    code, out, err = engine(f"{command} --out large")
    assert code == 130
    assert err.splitlines()[-1] == "engine: stopped, 1 of 2 pictures done; the same command with --resume goes on"
    assert sorted(p.name for p in Path("large").iterdir()) == ["a.webp", "b.webp.work.zarr"]
    part = json.loads(engine("info large/b.webp.work.zarr --json")[1])
    assert part["shards"]["written"] > 0
    shutil.copytree("large", "other")
    code, out, _ = engine(f"{command} --out large --resume")
    assert code == 0
    assert "2 pictures: 1 written, 1 done before" in out
    assert contents("large") == contents("whole")
    assert engine(part["continue"].removeprefix("engine ").replace("large", "other"))[0] == 0
    assert contents("other") == contents("whole")


def test_largest_picture_of_all_decides_on_precision(engine, folder, shots, monkeypatch):
    """Also where it is done: a resumed command gives the same bits."""
    asked, real = [], measure._precisions

    def precisions(model, request, *others):
        asked.append(request.init.name)
        return real(model, request, *others)

    monkeypatch.setattr(measure, "_precisions", precisions)
    command = f"upscale shots --model {NETWORK} --out large"
    assert engine(command)[0] == 1
    whole = contents("large")
    (folder / "large" / "a.png").unlink()
    assert engine(f"{command} --resume")[0] == 1
    assert contents("large") == whole
    assert asked == ["b.jpg", "b.jpg"]


@pytest.mark.slow
def test_folder_is_killed_twice_and_resumed(folder, call):
    """40 pictures, 5 of them broken: 35 results equal to those of an undisturbed run, 5 named, exit code 1."""
    (folder / "in").mkdir()
    for number in range(40):
        path = folder / "in" / f"p{number:02}.{EXTENSIONS[number % 5]}"
        small.photograph(path, 16 + number % 7, 20 + number % 5)
        if path.name in BROKEN:
            path.write_bytes(BROKEN[path.name](path.read_bytes()))
    command = f"upscale in --model {NETWORK} {EXACT} --scale 2"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for least in (5, 15):
        words = [sys.executable, "-m", "engine", *command.split(), "--out", "out", "--resume", "--quiet"]
        with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while len(list((folder / "out").glob("*.png"))) < least and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    code, out, err = call(f"{command} --out out --resume")
    assert code == 1
    assert call(f"{command} --out whole --quiet")[0] == 1
    assert len(contents("out")) == 35
    assert contents("out") == contents("whole")
    assert {line.split()[0] for line in out.splitlines() if "failed: " in line} == {f"in/{name}" for name in BROKEN}
    assert "5 failed" in out.splitlines()[-1]
    assert "5 of 40 pictures failed" in err.splitlines()[-1]


def test_formats_in_other_programs(engine, folder):
    """Pixels, resolution and origin, as Pillow and tifffile read them."""
    small.photograph(folder / "a.png", 12, 16)
    command = f"upscale a.png --model {NETWORK} {EXACT} --dpi 150"
    assert engine(f"{command} --out a.zarr")[0] == 0
    expected = pixels(folder / "a.zarr").transpose(1, 2, 0)
    for suffix in ("png", "jpg", "webp", "tif", "ome.tif"):
        code, out, _ = engine(f"{command} --out b.{suffix}")
        assert code == 0
        assert "print 1.1 x 0.8 cm at 150 dpi" in out
        difference = np.abs(opened(f"b.{suffix}").astype(int) - expected)
        assert difference.max() == 0 if suffix in ("png", "tif", "ome.tif") else difference.mean() < 12, suffix
        if suffix in ("png", "jpg", "webp"):
            with Image.open(f"b.{suffix}") as image:
                exif = image.getexif()
                assert exif[0x011A] == exif[0x011B] == 150
                about = json.loads(exif[0x010E])
        elif suffix == "tif":
            with tifffile.TiffFile("b.tif") as file:
                assert (file.pages[0].asarray() == expected).all()
                assert file.pages[0].get_resolution("inch") == (150, 150)
                about = json.loads(file.pages[0].description)
        assert about["licences"] == ["not stated: sr.safetensors"]
        assert engine(f"{command} --out b.{suffix} --resume")[1] == f"b.{suffix}: done before\n"
    code, _, err = engine(f"{command} --scale 2 --out b.png --resume")
    assert (code, err) == (4, "engine: b.png: exists; give --overwrite or choose another name\n")


def test_sizes(engine, folder):
    small.photograph(folder / "a.png", 12, 16)
    for options, size in (
        ("", (48, 64)),
        ("--scale 1", (12, 16)),
        ("--scale 2.5", (30, 40)),
        ("--scale 6", (72, 96)),
        ("--width 100", (75, 100)),
        ("--size 32x24", (24, 32)),
        ("--width-mm 10 --dpi 254", (75, 100)),
    ):
        assert engine(f"upscale a.png --model {NETWORK} {EXACT} {options} --out a.png.png --overwrite -q")[0] == 0
        assert opened("a.png.png").shape == (*size, 3), options


def test_chain_is_its_models_one_after_the_other(engine, folder):
    """As one render from the picture of the other; all of them run, also where the first is large enough."""
    small.photograph(folder / "a.png", 8, 8)
    chain = f"upscale a.png --model {NETWORK} --model {NETWORK} {EXACT}"
    code, out, _ = engine(f"{chain} --out b.png")
    assert code == 0
    assert "by sr + sr" in out
    assert "for a material" not in out
    one = f"upscale --model {NETWORK} {EXACT}"
    assert engine(f"{one} a.png --out c.png")[0] == engine(f"{one} c.png --out d.png")[0] == 0
    difference = np.abs(opened("b.png").astype(int) - opened("d.png"))
    assert opened("b.png").shape == (128, 128, 3)
    assert difference.max() <= 3  # c.png is rounded to 8 bits
    plan = json.loads(engine(f"{chain} --size 30x30 --out e.png --dry-run --json")[1])["plan"]
    assert (len(plan["stages"]), plan["enlarged"]) == (2, [128, 128])
    code, out, _ = engine(f"{chain} --size 30x30 --out e.png --dry-run")
    assert "for a material, take a power of two: --size 32x32" in out


def test_names_of_results(engine, folder, shots):
    """A pattern, the same file twice, and two pictures of one stem."""
    (shots / "c.png").unlink()
    small.photograph(shots / "a.jpg", 8, 8)
    code, out, _ = engine(f"upscale 'shots/*.[jp][pn]g' shots/b.jpg --model {NETWORK} --out large --dry-run --json")
    assert code == 0
    found = {p["picture"]: p["path"] for p in json.loads(out)["pictures"]}
    assert found == {
        "shots/a.jpg": "large/a.jpg.png",
        "shots/a.png": "large/a.png.png",
        "shots/b.jpg": "large/b.png",
    }
    assert not Path("large").exists()


def test_refusals(engine, folder, shots):
    """One line and no change, before any work."""
    (folder / "file").write_text("mine")
    (folder / "empty").mkdir()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    one, all_ = f"upscale shots/a.png --model {NETWORK}", f"upscale shots --model {NETWORK}"
    for line, code, words in (
        (f"{one} --out shots/a.png --overwrite", 2, "is the input shots/a.png, which it would replace"),
        (f"{one} shots/b.jpg --out shots --overwrite", 2, "shots/a.png is a picture to enlarge"),
        (f"{all_} --out shots --format tif", 2, "--out shots: is the folder of the pictures"),
        (f"{all_} --out a.png", 2, "--out a.png: names one result, for 3 pictures"),
        (f"{all_} --out a.dzi", 2, "--out a.dzi: names one result, for 3 pictures"),
        (f"{all_} --out file", 4, "file: is a file; name a folder"),
        (f"{one} --out a.gif", 2, "--out a.gif: no such format"),
        (f"{one} --out a.png --format tif", 2, "--format tif: a.png names the format already"),
        (f"{one} --out a.png --quality 80", 2, "--quality: does not apply to .png"),
        (f"{all_} --out out --format tif --quality 80", 2, "--quality: deflate is lossless"),
        (f"{one} --out a.zarr --quality 80", 2, "--quality: does not apply to stores"),
        (f"{one} --out a.png --size 9x9 --scale 2", 2, "--size and --scale: exclude each other"),
        (f"{one} --out a.png --width-mm 9 --scale 2", 2, "--width-mm and --scale: exclude each other"),
        (f"{one} --out a.png --scale 65", 2, "--scale 65: must be from 1 to 64"),
        (f"upscale --model {NETWORK} --out out", 2, "no picture; name pictures, folders or patterns"),
        (f"upscale empty --model {NETWORK} --out out", 4, "empty: no picture in this folder"),
        (f"upscale 'x*.png' --model {NETWORK} --out out", 4, "x*.png: matches no file"),
        (f"upscale missing.png --model {NETWORK} --out a.png", 4, "missing.png: no such picture"),
        (f"{one} --model missing.pth --out a.png", 4, "missing.pth: no such file"),
        (f"{all_} --memory 10MB --out out", 3, "give at least --memory"),
    ):
        found, _, err = engine(line)
        assert (found, words in err.splitlines()[-1]) == (code, True), (line, err)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
