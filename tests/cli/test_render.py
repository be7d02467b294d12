"""Renders into pictures through a working store, the words that continue an interrupted one, and what is printed."""

import errno
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.stores import pixels

from engine.job import Job
from engine.run.stage import Stage

MODEL = "model.safetensors"
SMALL = f"render {MODEL} --size 128x96 --stages 2 --tile 8 --overlap 4 --precision fp32"
NEXT = SMALL.replace("128x96", "96x128")


@pytest.fixture
def folder(tmp_path, monkeypatch, model_file):
    """Working folder with a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).symlink_to(model_file)
    return tmp_path


@pytest.fixture
def engine(folder, call):
    """Command line in the working folder."""
    return call


@pytest.fixture
def interrupted(monkeypatch):
    """Function ``interrupted(number)``: run ``number`` of a network raises KeyboardInterrupt, as a second Ctrl-C does."""

    def arrange(number):
        count, real = 0, Stage.run

        def run(*arguments):
            nonlocal count
            count += 1
            if count == number:
                monkeypatch.setattr(Stage, "run", real)
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(Stage, "run", run)

    return arrange


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != MODEL)


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_pictures_equal_stores(engine, folder):
    """In every format, with its folder made; only --keep-store leaves the working store."""
    assert engine(f"{SMALL} --seed 7 --out s.zarr")[0] == 0
    expected = pixels(folder / "s.zarr").transpose(1, 2, 0)
    for suffix in ("png", "tif", "ome.tif", "jpg", "webp"):
        code, out, _ = engine(f"{SMALL} --seed 7 --out new/a.{suffix}")
        assert code == 0
        assert out.splitlines()[-2].startswith(f"new/a.{suffix}: 128x96, ")
        assert out.splitlines()[-1] == f"look at it: new/a.{suffix}"
        difference = np.abs(opened(folder / "new" / f"a.{suffix}").astype(int) - expected)
        assert difference.max() == 0 if suffix in ("png", "tif", "ome.tif") else difference.mean() < 12, suffix
    assert len(names(folder / "new")) == 5
    assert engine(f"{SMALL} --seed 7 --out k.png --keep-store")[0] == 0
    assert names(folder) == ["k.png", "k.png.work.zarr", "new", "s.zarr"]
    assert (pixels(folder / "k.png.work.zarr").transpose(1, 2, 0) == expected).all()


def test_report_and_json_name_the_results(engine, folder):
    code, out, _ = engine(f"{SMALL} --out a.png --json --report r.json")
    assert code == 0
    shown = json.loads(out)
    assert shown == json.loads((folder / "r.json").read_text())
    assert (shown["path"], shown["store"]) == ("a.png", None)
    assert shown["picture"]["bytes"] == (folder / "a.png").stat().st_size
    shown = json.loads(engine(f"{SMALL} --out a.zarr --json")[1])
    assert (shown["path"], shown["store"], shown["picture"]) == ("a.zarr", "a.zarr", None)


def test_failure_after_the_picture_is_resumed(engine, folder, monkeypatch):
    """The picture is the render's own from then on; one that a kept store has written needs consent again."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "r.json")

    with monkeypatch.context() as patch:
        patch.setattr("engine.cli.render.write_text", full)
        assert engine(f"{SMALL} --seed 7 --out a.png --report r.json")[0] == 1
    assert names(folder) == ["a.png", "a.png.work.zarr"]
    assert engine(f"{SMALL} --seed 7 --out a.png --report r.json --resume")[0] == 0
    assert names(folder) == ["a.png", "r.json"]
    assert engine(f"{SMALL} --seed 7 --out k.png --keep-store")[0] == 0
    assert engine(f"{SMALL} --seed 7 --out k.png --keep-store --resume")[0] == 4


def test_existing_results_are_refused_before_any_work(engine, folder, monkeypatch):
    """Also the last one of --count, a folder and a picture beyond its format."""
    (folder / "a-2.png").write_text("mine")
    (folder / "b-2.zarr").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "c.png.work.zarr").mkdir()

    def measured(*_, **__):
        raise AssertionError("work was done")

    with monkeypatch.context() as patch:
        patch.setattr(Job, "prepare", measured)
        for line, words in (
            (f"{SMALL} --count 3 --out a.png", "a-2.png: exists; give --overwrite"),
            (f"{SMALL} --count 3 --out b.zarr", "b-2.zarr: exists; give --resume"),
            (f"{SMALL} --out a-2.png --resume", "a-2.png: exists; give --overwrite"),
            (f"{SMALL} --out folder.png --overwrite", "folder.png: is a folder"),
            (f"{SMALL} --out c.png --overwrite", "c.png.work.zarr: in the way, and not from a render of c.png"),
        ):
            code, out, err = engine(line)
            assert (code, out) == (4, "")
            assert words in err
    before = names(folder)
    code, _, err = engine(f"{SMALL.replace('128x96', '17000x12750')} --seed 1 --out w.webp")
    assert code in (2, 3)
    assert "17000 x 12750 pixels exceed WebP" in err
    assert names(folder) == before
    assert (folder / "a-2.png").read_text() == "mine"
    assert engine(f"{SMALL} --count 2 --seed 7 --out n.ome.tif")[0] == 0
    assert names(folder) == sorted([*before, "n-7.ome.tif", "n-8.ome.tif"])


def test_interrupted_picture_is_resumed(engine, folder, interrupted):
    """An existing picture stays until its replacement is whole, and only --overwrite gave leave to replace it."""
    assert engine(f"{SMALL} --seed 7 --out whole.png")[0] == 0
    (folder / "a.png").write_text("mine")
    interrupted(5)
    code, _, err = engine(f"{SMALL} --seed 7 --out a.png --overwrite")
    assert code == 130
    assert err.splitlines()[-1] == "engine: interrupted; continue with --resume"
    assert (folder / "a.png").read_text() == "mine"

    shown = json.loads(engine("info a.png.work.zarr --json")[1])
    assert not shown["complete"]
    assert 0 < shown["shards"]["written"] < shown["shards"]["total"]
    assert (shown["width"], shown["height"], shown["seed"], shown["executor"]) == (128, 96, 7, "tiles")
    assert f"continue: {shown['continue']}" in engine("info a.png.work.zarr")[1]
    code, _, err = engine(f"{SMALL} --seed 7 --out a.png")
    assert code == 4
    assert engine(shown["continue"].removeprefix("engine "))[0] == 0
    assert (opened(folder / "a.png") == opened(folder / "whole.png")).all()
    assert names(folder) == ["a.png", "whole.png"]

    (folder / "whole.png").unlink()
    interrupted(5)
    assert engine(f"{SMALL} --seed 8 --out whole.png")[0] == 130
    code, _, err = engine(f"{SMALL} --seed 8 --out whole.png")
    assert (code, err.split(": ")[-1]) == (
        4,
        "an unfinished render is in whole.png.work.zarr; give --resume to finish it, or --overwrite to begin again\n",
    )
    (folder / "whole.png").write_text("mine")
    assert engine(f"{SMALL} --seed 8 --out whole.png --resume")[0] == 4
    assert engine(f"{SMALL} --seed 8 --out whole.png --overwrite")[0] == 0
    assert names(folder) == ["a.png", "whole.png"]


def test_info_continues_any_store(engine, folder, interrupted):
    """With the options of its render, and while it is unfinished: later the command would name local files."""
    options = f"{NEXT} --seed 3 --roi 16,32,64,48 --dither --memory 4GiB"
    assert engine(f"{options} --out whole.zarr")[0] == 0
    assert json.loads(engine("info whole.zarr --json")[1])["continue"] is None
    interrupted(7)
    assert engine(f"{options} --out a.zarr")[0] == 130
    words = json.loads(engine("info a.zarr --json")[1])["continue"]
    assert engine(words.removeprefix("engine "))[0] == 0
    assert (pixels(folder / "a.zarr") == pixels(folder / "whole.zarr")).all()
    assert "command" not in (folder / "a.zarr" / "zarr.json").read_text()
    out = engine("info a.zarr")[1]
    assert "a.zarr: 64x48, complete, " in out
    assert "seed 3, the region at 16,32 of 96x128" in out


def test_info_of_pictures_and_licences(engine, folder, model_file):
    assert engine(f"{SMALL} --seed 7 --out a.tif")[0] == 0
    _, out, err = engine("info a.tif")
    assert err == "", out
    assert out.startswith("a.tif: TIFF picture, 128x96, 3 channels of 8 bits, ")
    assert ", seed 7\n" in out
    checkpoint = model_file.parent / "sr.safetensors"
    assert engine(f"model build --out new.safetensors --sr {checkpoint} --licence MIT")[0] == 0
    assert all(not line.endswith(": ") for line in engine("info new.safetensors")[1].splitlines())


@pytest.mark.parametrize(("flag", "lines"), [("", 5), ("--quiet", 1), ("-v", 12)])
def test_lines_by_verbosity(engine, flag, lines):
    _, out, err = engine(f"{SMALL} {flag} --out a.zarr")
    assert (len(out.splitlines()) >= lines) if flag == "-v" else (len(out.splitlines()) == lines)
    assert (err == "") == (flag == "--quiet")


def test_quiet_plan_and_vram_on_a_cpu(engine):
    assert engine(SMALL.replace("render", "plan") + " -q") == (0, "", "")
    code, _, err = engine(SMALL.replace("render", "plan") + " -q --memory 100MB")
    assert code == 3
    assert len(err.splitlines()) == 1
    if not torch.cuda.is_available():
        code, _, err = engine(SMALL.replace("render", "plan") + " -q --vram 8GiB")
        assert (code, err) == (0, "warning: --vram: there is no GPU to limit; --memory limits the memory of a CPU\n")


def test_regions_say_how_they_compare(engine):
    plan = SMALL.replace("render", "plan") + " --roi 16,32,64,48"
    assert "64x48 at 16,32 of 128x96" in engine(plan)[1]
    assert "; pixels equal the whole render's" in engine(plan)[1].splitlines()[1]
    in_bands = engine(f"{plan} --executor bands")[1].splitlines()[1]
    assert "; pixels differ from the whole render's by seam error and rounding" in in_bands


def test_narrow_terminal_keeps_words_and_columns(folder):
    """60 columns: no line is longer, no word is cut, and no cell of the table is lost."""
    line = [sys.executable, "-m", "engine", *SMALL.replace("render", "plan").split(), "-v"]
    environment = {**os.environ, "COLUMNS": "60", "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    wide = subprocess.run(line, capture_output=True, text=True, check=True, env=environment).stdout
    terminal, ours = pty.openpty()
    with subprocess.Popen(line, stdout=ours, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(ours)
        output = b""
        while chunk := _read(terminal):
            output += chunk
    os.close(terminal)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output.decode().replace("\r", ""))
    assert max(map(len, plain.splitlines())) <= 60
    assert plain.split() != []
    fixed = [
        word for word in wide.split() if not any(c.isdigit() for c in word)
    ]  # times and memory differ from run to run
    assert [word for word in plain.split() if not any(c.isdigit() for c in word)] == fixed
    assert "…" not in plain


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def test_help_command_and_completion(call, tmp_path):
    """Completion of commands and options in bash, by the script that --install-completion installs."""
    assert call("help train sr")[1] == call("train sr --help")[1]
    assert call("help")[1] == call("--help")[1]
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    line = [sys.executable, "-m", "engine", "--install-completion", "--shell", "bash"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    (script,) = [p for p in tmp_path.rglob("*") if p.is_file() and p.name == "engine"]
    for words, expected in (("engine ren", "render"), ("engine render --over", "--overwrite")):
        *_, last = words.split()
        function = r"$(complete -p engine | sed 's/.*-F \([^ ]*\).*/\1/')"
        program = (
            f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; COMP_LINE='{words}'; "
            f"COMP_POINT={len(words)}; {function} engine {last}; echo ${{COMPREPLY[*]}}"
        )
        completed = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        assert expected in completed.stdout.split(), completed
