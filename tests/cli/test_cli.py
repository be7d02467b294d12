"""The command line: exit codes, one line an error, nothing but the result on stdout, nothing written that was not asked for."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.cli import app as cli
from engine.job import Job
from engine.model.bundle import load
from engine.plan.request import Request

MODEL = "model.safetensors"
both = pytest.mark.parametrize("executor", ["tiles", "bands"])
USUAL = {"--out": "out.zarr", "--size": "256x192", "--stages": "2", "--tile": "16", "--overlap": "4"}


def render(changes="", command="render"):
    """The usual command line with other or further options."""
    usual = " ".join(f"{flag} {value}" for flag, value in USUAL.items() if flag not in changes.split())
    return f"{command} {MODEL} {usual} {changes}".strip()


@pytest.fixture(scope="module")
def measured(model_file):
    """Memory and speed of the model on this machine are measured once and then remembered: a line on stderr less."""
    Job(load(model_file), Request(size=(192, 256), overlap="4", stages=2, precision="fp32"), Path("out.zarr"))
    return model_file


@pytest.fixture
def folder(tmp_path, monkeypatch, measured, picture):
    """The working folder: a model and a picture of 32x24."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).symlink_to(measured)
    pixels = (picture(24, 32).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path


@pytest.fixture
def engine(folder, call):
    """The command line, in the working folder."""
    return call


def everything(folder):
    """Every path below, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


COMMANDS = ["", "render", "plan", "probe", "info", "export", "model", "model build", "train", "train structure",
            "train sr", "train distil", "train preset", "score"]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(engine, command):
    code, out, err = engine(f"{command} --help")
    assert (code, err) == (0, "")
    assert f"Usage: engine {command}".rstrip() in out
    assert "--empty" not in out  # what the parser adds beside lists


def test_version(engine):
    code, out, _ = engine("--version")
    assert code == 0
    assert out.strip().count(".") == 2


# What is wrong, and the code and the words that answer it.
REFUSALS = [
    ("paint", 2, 'Unknown command "paint"'),
    ("model paint", 2, 'Unknown command "paint"'),
    (render("--colour red"), 2, "--colour"),
    (f"render {MODEL}", 2, "--out requires"),
    ("probe", 2, "MODEL requires"),
    (f"plan {MODEL} --resume", 2, "--resume"),
    (render("--size big"), 2, "size 'big': write WIDTHxHEIGHT"),
    (render("--size 0x100"), 2, "size '0x100'"),
    (render("--size -5x100"), 2, "--size"),
    (render("--roi 1,2"), 2, "region '1,2': write X,Y,WIDTH,HEIGHT"),
    (render("--roi 200,0,57,10"), 2, "--roi 200,0,57,10: not inside the canvas of 256x192"),
    (render("--roi 0,0,0,10"), 2, "--roi 0,0,0,10: not inside"),
    (render("--tile 0"), 2, "--tile 0: needs at least 1"),
    (render("--tile -16"), 2, "--tile -16: needs at least 1"),
    (render("--tile many"), 2, "--tile"),
    (render("--executor rows"), 2, "--executor rows: use one of auto, tiles, bands"),
    (render("--stages 9"), 2, "--stages 9: the model has 2"),
    (render("--stages 0"), 2, "--stages 0"),
    (render("--overlap foo"), 2, "overlap 'foo': use auto, exact"),
    (render("--overlap erf:2"), 2, "overlap 'erf:2'"),
    (render("--overlap -4"), 2, "overlap '-4'"),
    (render("--overlap auto --seam-tolerance 0"), 2, "seam tolerance 0.0"),
    (render("--precision x"), 2, "use auto, one of fp32, bf16, fp16"),
    (render("--device abacus"), 2, "--device abacus: not usable here"),
    (render("--device meta"), 2, "--device meta: not usable here"),
    (render("--seed -1"), 2, "--seed -1: must be from 0"),
    (render("--seed 18446744073709551616"), 2, "--seed 18446744073709551616: must be"),
    (render("--seed 18446744073709551615 --count 2"), 2, "--seed 18446744073709551616: must be"),
    (render("--count 0"), 2, "--count 0: must be at least 1"),
    (render("--count 2 --json"), 2, "--json and --report describe one render"),
    (render("--count 2 --report r.json"), 2, "--json and --report describe one render"),
    (render("--resume --overwrite"), 2, "--resume and --overwrite exclude each other"),
    (render("--memory lots"), 2, "memory 'lots'"),
    (render("--memory 0"), 2, "memory '0'"),
    (render("--memory 100MB"), 3, "GiB of memory"),
    (render("--memory 100MB --executor bands"), 3, "GiB of memory"),
    (f"render {MODEL} --out out.zarr --overlap 4 --memory 100MB --executor bands", 3, "bands: the narrowest strip"),
    (f"plan {MODEL} --overlap 4 --memory 100MB --executor bands", 3, "--executor tiles"),
    (f"render {MODEL} --out out.zarr --overlap 4 --memory 100MB", 3, "--memory allows 95.4 MiB"),
    (f"plan {MODEL} --overlap 4 --memory 100MB", 3, "--memory allows 95.4 MiB"),
    (render("--init absent.png"), 4, "absent.png: no such picture"),
    (render(f"--init {MODEL}"), 4, "cannot be read as a picture"),
    (render("--init ."), 4, "no such picture"),
    (render("--init picture.png --size 256x100"), 2, "would stretch the picture"),
    (render("--report absent/r.json"), 2, "--report absent/r.json: cannot be written there"),
    (render("--report ."), 2, "--report .: cannot be written there"),
    (render("--report r.json --dry-run"), 2, "--dry-run makes none"),
    (render("--out picture.png/out.zarr"), 4, "picture.png is not a folder"),
    (f"plan {MODEL} --overlap 4 --out picture.png/out.zarr", 4, "picture.png is not a folder"),
    (render("--out picture.png"), 4, "picture.png: exists"),
    (render("--out picture.png --overwrite"), 4, "is not a Zarr store"),
    (render("--out picture.png --resume"), 4, "not a store of this engine"),
    (render("--out .."), 2, "names no store"),
    (render("--out . --overwrite"), 2, "names no store"),
    (render("--out / --overwrite"), 2, "names no store"),
    ("export absent.zarr out.tif", 4, "absent.zarr"),
    ("probe picture.png", 4, "picture.png: not a checkpoint"),
    (f"probe {MODEL} --image absent.png", 4, "absent.png: no such picture"),
    (f"probe {MODEL} --plot absent/p.png", 2, "--plot absent/p.png: cannot be written there"),
    (f"probe {MODEL} --plot p.doc", 2, "--plot p.doc: name a file that ends in .png or .svg"),
    (f"model build --out m.bin --sr {MODEL}", 2, "ends in .safetensors"),
    ("model build --out m.safetensors", 2, "--sr requires"),
    ("model build --out m.safetensors --sr absent.pth", 4, "absent.pth: no such file"),
    (f"model build --out m.safetensors --sr {MODEL} --structure absent.safetensors", 4, "absent.safetensors"),
    ("train absent.jpg --out m.safetensors", 4, "absent.jpg: no such photograph"),
    ("train picture.png --out m.safetensors", 4, "at least 256 are needed"),
    ("train sr absent.jpg --out s.safetensors", 4, "absent.jpg: no such photograph"),
    ("train structure absent.jpg --out s.safetensors", 4, "absent.jpg"),
    ("train structure picture.png --out s.safetensors", 4, "at least 256 are needed"),
    ("train structure picture.png --out s.safetensors --precision x", 2, "--precision"),
    ("train structure picture.png --out s.safetensors --preset x", 2, "--preset"),
    ("train structure picture.png --out s.safetensors --config absent.toml", 4, "absent.toml"),
    ("train structure picture.png --out s.safetensors --iterations 0", 2, "iterations"),
]


@pytest.mark.parametrize(("line", "code", "words"), REFUSALS, ids=[line for line, _, _ in REFUSALS])
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(engine, folder, line, code, words):
    before = everything(folder)
    found, out, err = engine(line)
    (said,) = err.splitlines()
    assert said.startswith("engine: ")
    assert words in said
    assert found == code
    assert out == "" or line.startswith("plan")  # a plan that does not fit is shown, then refused
    assert everything(folder) == before


def test_cuda_without_cuda(engine):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = engine(render("--device cuda"))
    assert (code, out) == (2, "")
    (said,) = err.splitlines()
    assert "--device cuda: not usable here" in said


@both
def test_an_error_of_the_system_is_one_line_too(engine, monkeypatch, executor):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "out.zarr/0/c/0/0/0")

    monkeypatch.setattr("engine.io.zarr_store.ZarrSink.write", full)
    code, _, err = engine(render(f"--executor {executor}"))
    assert code == 1
    assert err.splitlines()[-1].startswith("engine: out.zarr/0/c/0/0/0: No space left on device; ")
    assert "--resume" in err.splitlines()[-1]
    assert "Traceback" not in err


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried 4 bytes."
    ),
]


@both
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_line_too(engine, monkeypatch, error, executor):
    def greedy(*_, **__):
        raise error

    runs = {"tiles": "engine.archs.esrgan.RRDBNet.forward", "bands": "engine.bands.stream._SegmentStream.push"}
    monkeypatch.setattr(runs[executor], greedy)
    code, _, err = engine(render(f"--executor {executor}"))
    assert code == 1
    (said,) = [line for line in err.splitlines() if not line.startswith("rendering")]
    assert said == "engine: out of memory; use a smaller --memory or --tile"


def test_a_message_never_has_a_second_line(engine):
    code, _, err = engine("info 'a\nb.safetensors'")
    assert code == 4
    assert len(err.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error_of_ours(folder):
    command = [str(Path(sys.executable).parent / "engine"), "info", MODEL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# Results


@both
def test_a_render_says_what_it_did_and_reports_it(engine, folder, executor):
    code, out, err = engine(render(f"--report r.json --executor {executor}"))
    assert code == 0
    assert f"in 2 stages by {executor}, " in out
    assert "out.zarr: 256x192, complete" in out
    assert "engine:" not in err
    report = json.loads((folder / "r.json").read_text())
    assert report["plan"]["canvas"] == [192, 256]
    assert report["plan"]["seed"] == 0
    assert report["plan"]["executor"] == executor
    measured = report["measured"]
    assert measured["writes"] == 12
    parts = measured["compute_seconds"], measured["write_seconds"]
    assert min(parts) > 0
    assert (sum(parts) if executor == "tiles" else max(parts)) <= measured["seconds"]  # bands are written meanwhile
    assert measured["host_peak"] > 0
    assert report["projection"]["host"] > 0
    assert set(report["machine"]) == {"python", "platform", "cpu_count", "memory"}


def test_json_is_all_that_goes_to_stdout(engine, folder):
    code, out, _ = engine(render("--json --report r.json"))
    assert code == 0
    assert json.loads(out) == json.loads((folder / "r.json").read_text())
    for line in (f"plan {MODEL} --overlap 4 --json", f"info {MODEL} --json", f"probe {MODEL} --json"):
        code, out, err = engine(line)
        assert code == 0
        assert json.loads(out)
        assert "engine:" not in err
    code, out, _ = engine("export out.zarr out.tif --json")
    assert code == 0
    assert json.loads(out)["width"] == 256


def test_info_as_json_is_the_manifest(engine, folder):
    shown = json.loads(engine(f"info {MODEL} --json")[1])
    assert shown["path"] == MODEL
    assert shown["bytes"] == (folder / MODEL).stat().st_size
    assert [stage["weights"] for stage in shown["stages"]] == ["sr0", "sr0"]
    assert shown["stages"][0]["parameters"] > 0
    assert shown["structure"]["parameters"] > 0


@pytest.mark.parametrize(
    "line",
    [render("--dry-run"), render(command="plan"), render("--executor bands", command="plan")],
    ids=["dry-run", "plan", "plan of bands"],
)
def test_a_plan_writes_nothing(engine, folder, line):
    before = everything(folder)
    code, out, _ = engine(line)
    assert code == 0
    assert "256x192 from a base of 16x12 in 2 stages" in out
    assert everything(folder) == before
    code, _, _ = engine(line.replace("out.zarr", "absent/deep/out.zarr"))
    assert code == 0
    assert everything(folder) == before


@both
def test_plan_says_what_a_dry_run_says(engine, executor):
    option = f"--executor {executor}"
    lines = (render(f"--dry-run {option}"), render(option, command="plan"))
    dry, plan = (json.loads(engine(f"{line} --json")[1]) for line in lines)
    for key in ("plan", "digest", "seam_error_levels"):
        assert dry[key] == plan[key]
    # The idle process and the free disk are measured anew.
    assert dry["projection"]["host_parts"] == plan["projection"]["host_parts"]
    assert dry["projection"]["pieces"] == plan["projection"]["pieces"]
    assert dry["projection"]["pixels"] == plan["projection"]["pixels"]
    # And the render does what the plan said.
    assert json.loads(engine(render(f"--json {option}"))[1])["digest"] == plan["digest"]


def test_a_dry_run_leaves_a_store_alone(engine, folder):
    assert engine(render())[0] == 0
    before = everything(folder)
    for flag in ("", "--resume", "--overwrite"):
        assert engine(render(f"--dry-run {flag}"))[0] == 0
        assert everything(folder) == before


def test_count_makes_a_store_a_seed_equal_to_single_renders(engine, folder):
    assert engine(render("--seed 6 --count 2"))[0] == 0
    assert not (folder / "out.zarr").exists()
    pair = [everything(folder / f"out-{seed}.zarr") for seed in (6, 7)]
    assert pair[0].keys() == pair[1].keys()
    shards = [path for path in pair[0] if "/c/" in path and pair[0][path]]
    assert shards
    assert all(pair[0][path] != pair[1][path] for path in shards)
    for seed, expected in zip((6, 7), pair, strict=True):
        assert engine(render(f"--seed {seed} --out out-{seed}.zarr --overwrite"))[0] == 0
        assert everything(folder / f"out-{seed}.zarr") == expected


def test_overwrite_replaces_a_store(engine, folder):
    assert engine(render())[0] == 0
    first = everything(folder / "out.zarr")
    (folder / "out.zarr" / "stray").write_text("")
    assert engine(render("--seed 1 --overwrite"))[0] == 0
    second = everything(folder / "out.zarr")
    assert first.keys() == second.keys()
    assert first != second


def test_missing_folders_above_the_store_are_made(engine, folder):
    assert engine(render("--out a/b/out.zarr"))[0] == 0
    assert sorted(p.name for p in (folder / "a" / "b").iterdir()) == ["out.zarr"]


def test_probe_keeps_its_measurement_in_the_file(engine, folder, model_file):
    (folder / "own.safetensors").write_bytes(model_file.read_bytes())
    code, out, _ = engine("probe own.safetensors --save")
    assert code == 0
    assert "stage 2" in out
    stored = json.loads(engine("info own.safetensors --json")[1])
    assert all(stage["profile"]["seam"] for stage in stored["stages"])
    assert "levels" in engine("info own.safetensors")[1]
    code, _, err = engine("probe picture.pth --save")
    assert code == 4


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_probe_draws_what_it_measured(engine, folder, suffix):
    pytest.importorskip("matplotlib")
    assert engine(f"probe {MODEL} --plot seams.{suffix}")[0] == 0
    assert (folder / f"seams.{suffix}").stat().st_size > 5000


def test_build_shows_the_model(engine, folder, model_file):
    code, out, _ = engine(
        f"model build --out new.safetensors --sr {model_file.parent / 'sr.safetensors'} --licence MIT"
    )
    assert code == 0
    assert "licence: MIT: sr.safetensors" in out
    assert (folder / "new.safetensors").is_file()


# Start


def test_help_is_quick_and_imports_no_torch(tmp_path):
    code = (
        "import sys\nfrom engine.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    seconds = []
    for arguments in ([], ["--help"], ["render", "--help"]):
        start = time.perf_counter()
        found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
        assert found.returncode == 0
        assert found.stdout.startswith("Usage: engine")
        assert not {"torch", "zarr", "numpy", "pyvips"} & set(found.stderr.split())
    assert min(seconds) < 1.0  # the best of three: the machine may be busy


def test_the_console_script_and_an_interrupt_before_the_start(tmp_path):
    script = Path(sys.executable).parent / "engine"
    found = subprocess.run(
        [script, "info", "absent"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "20"}
    )
    assert found.returncode == 4
    assert found.stderr.startswith("engine: absent: no such file; ")
    assert len(found.stderr.splitlines()) == 1


def test_ctrl_c_before_the_render_is_one_line(engine, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.cli.render.load", interrupted)
    code, out, err = engine(render())
    assert (code, out) == (130, "")
    assert len(err.splitlines()) == 1
    assert "--resume" in err


@pytest.mark.parametrize(
    ("set_before", "spins"),
    [({}, str(cli.SPINS)), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_wait_briefly_unless_the_user_wants_otherwise(set_before, spins):
    """In a process of its own: the library reads it when torch is loaded, which the command line must not have done."""
    program = (
        "import os, sys\nfrom engine import cli\n"
        "try: cli.main(['--version'])\nexcept SystemExit: pass\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    said = subprocess.run(
        [sys.executable, "-c", program], env=clean | set_before, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[-1] == f"{spins} False"
