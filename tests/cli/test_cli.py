"""Command line: exit codes, one-line errors, results alone on stdout, and no files beyond the requested ones."""

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

from engine.cli.tables import print_table
from engine.errors import ModelError
from engine.job import Job
from engine.model.bundle import load
from engine.plan.request import Request
from engine.threads import SPIN_COUNT

MODEL = "model.safetensors"
SCRIPT = Path(sys.executable).parent / "engine"
DEFAULTS = {
    "--out": "out.zarr",
    "--size": "256x192",
    "--stages": "2",
    "--tile": "16",
    "--overlap": "4",
    "--precision": "fp32",
}
LARGE = f"{MODEL} --overlap 4 --precision fp32"
"""Arguments of a render of all stages, whose tiles are chosen."""

BOTH = ("tiles", "bands")


def render(changes="", command="render"):
    """Command line of a small render with other or further options."""
    defaults = " ".join(f"{flag} {value}" for flag, value in DEFAULTS.items() if flag not in changes.split())
    return f"{command} {MODEL} {defaults} {changes}".strip()


@pytest.fixture(scope="module")
def measured(model_file):
    """Model whose memory and speed are in the cache, so that no command logs their measurement."""
    for executor in BOTH:
        request = Request(size=(256, 192), overlap="4", stages=2, precision="fp32", executor=executor)
        Job.prepare(load(model_file), request, Path("out.zarr"))
    return model_file


@pytest.fixture
def folder(tmp_path, monkeypatch, measured, picture):
    """Working folder with a model and a picture of 32x24."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).symlink_to(measured)
    pixels = (picture(24, 32).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path


@pytest.fixture
def engine(folder, call):
    """Command line in the working folder."""
    return call


def snapshot(folder):
    """Every path below a folder, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


COMMANDS = ["", "help", "render", "upscale", "models", "plan", "probe", "info", "export", "model", "model build", "train",
            "train structure", "train sr", "train distil", "train preset", "score"]  # fmt: skip


def test_every_command_has_help(engine):
    for command in COMMANDS:
        code, out, err = engine(f"{command} --help")
        assert (code, err) == (0, ""), command
        assert f"Usage: engine {command}".rstrip() in out
        assert "--empty" not in out  # cyclopts adds it to lists by default
        assert "[default: False]" not in out
        assert "[default: ]" not in out


def test_version(engine):
    code, out, _ = engine("--version")
    assert code == 0
    assert out.strip().count(".") == 2


# Command line, exit code and words of the error.
REFUSALS = [
    ("paint", 2, 'Unknown command "paint"'),
    ("model paint", 2, 'Unknown command "paint"'),
    (render("--colour red"), 2, "--colour"),
    (f"render {MODEL}", 2, "--out requires"),
    ("probe", 2, "MODEL requires"),
    (f"plan {MODEL} --resume", 2, "--resume"),
    (f"plan {MODEL} --no-dither", 2, "--no-dither"),
    (render("--size big"), 2, "--size big: not a size; write WIDTHxHEIGHT"),
    (render("--size 0x100"), 2, "--size 0x100: not a size"),
    (render(f"--size 1{'0' * 30}x1"), 2, "--size: a side is too long"),
    (render(f"--memory 1{'0' * 400}GiB"), 2, "GiB: not an amount of memory"),
    (render("--size -5x100"), 2, "--size -5x100: not a size"),
    (render("--init picture.png other.png"), 2, "other.png: too many arguments; --init takes one picture"),
    ("render --init picture.png other.png --out out.zarr", 2, "--init picture.png: takes one picture"),
    (render("--quiet -v"), 2, "--quiet and --verbose: exclude each other"),
    (render("--keep-store"), 2, "--keep-store: out.zarr is a store"),
    (render("--roi 1,2"), 2, "--roi 1,2: not a region; write X,Y,WIDTH,HEIGHT"),
    (
        render("--roi 200,0,57,10"),
        2,
        "--roi 200,0,57,10: not inside the canvas of 256x192; use X,Y,WIDTH,HEIGHT inside it",
    ),
    (render("--roi 0,0,0,10"), 2, "--roi 0,0,0,10: not a region"),
    (render("--tile 0"), 2, "--tile 0: must be at least 1"),
    (render("--tile -16"), 2, "--tile -16: not a tile; write a side such as 64, or WIDTHxHEIGHT such as 128x64"),
    (render("--tile many"), 2, "--tile"),
    (render("--executor rows"), 2, "--executor rows: unknown executor; use "),
    (render("--stages 9"), 2, "--stages 9: the model has 2 super-resolution steps; use 1 to 2"),
    (render("--stages 0"), 2, "--stages 0: the model has 2"),
    (render("--overlap foo"), 2, "--overlap foo: unknown policy; use auto, exact"),
    (render("--overlap erf:2"), 2, "--overlap erf:2: unknown policy"),
    (render("--overlap -4"), 2, "--overlap -4: unknown policy"),
    (render("--overlap auto --seam-tolerance 0"), 2, "--seam-tolerance 0.0: must be above 0"),
    (render("--precision x"), 2, "fp32, bf16, fp16"),
    (render("--device abacus"), 2, "--device abacus"),
    (render("--device meta"), 2, "--device meta"),
    (render("--seed -1"), 2, "--seed -1: must be from 0"),
    (render("--seed 18446744073709551616"), 2, "--seed 18446744073709551616: must be"),
    (render("--seed 18446744073709551615 --count 2"), 2, "--seed 18446744073709551616: must be"),
    (render("--noise-gain 5"), 2, "--noise-gain 5: must be from 0 (silent) to 4"),
    (render("--noise-gain 2"), 2, "--noise-gain 2: model.safetensors has no noise channels; leave it out"),
    (render("--count 0"), 2, "--count 0: must be at least 1"),
    (render("--count 2 --json"), 2, "--json and --report: describe one render"),
    (render("--count 2 --report r.json"), 2, "--json and --report: describe one render"),
    (render("--resume --overwrite"), 2, "--resume and --overwrite: exclude each other"),
    (render("--memory lots"), 2, "--memory lots: not an amount of memory"),
    (render("--vram lots"), 2, "--vram lots: not an amount of memory"),
    (render("--memory 0"), 2, "--memory 0: has no unit"),
    (render("--memory 100MB"), 3, "GiB"),
    (render("--memory 100MB --executor bands"), 3, "GiB"),
    (f"render {LARGE} --out out.zarr --memory 100MB --executor bands", 3, "bands"),
    (f"plan {LARGE} --memory 100MB --executor bands", 3, "give at least --memory"),
    (f"render {LARGE} --out out.zarr --memory 100MB", 3, "95.4 MiB"),
    (f"plan {LARGE} --memory 100MB", 3, "95.4 MiB"),
    (render("--init absent.png"), 4, "absent.png: "),
    (render(f"--init {MODEL}"), 4, f"{MODEL}: "),
    (render("--init ."), 4, ".: "),
    (render("--init picture.png --size 256x100"), 2, "--size 256x100: would stretch the picture of 32x24"),
    (render("--report absent/r.json"), 2, "--report absent/r.json: cannot be written"),
    (render("--report ."), 2, "--report .: cannot be written"),
    (render("--report r.json --dry-run"), 2, "--report r.json: holds measurements, and --dry-run makes none"),
    (f"plan {MODEL} --report r.json", 2, "--report belongs to --theory"),
    (render("--out picture.png/out.zarr"), 4, "picture.png is not a folder"),
    (f"plan {LARGE} --out picture.png/out.zarr", 4, "picture.png is not a folder"),
    (render("--out picture.png"), 4, "picture.png: "),
    (render("--out picture.png --resume"), 4, "picture.png: "),
    (render("--out .."), 4, "..: exists; give --resume"),
    (render("--out .. --resume"), 2, "--out ..: names no store"),
    (render("--out . --overwrite"), 2, "--out .: names no store"),
    (render("--out / --overwrite"), 2, "--out /: names no store"),
    ("export absent.zarr out.tif", 4, "absent.zarr"),
    ("export absent.zarr picture.png", 4, "picture.png: exists; give --overwrite"),
    ("export absent.zarr absent.zarr/x.png", 2, "absent.zarr/x.png: lies in the store"),
    ("export absent.zarr out.tif --bigtiff --no-bigtiff", 2, "--no-bigtiff: given twice, or beside its opposite"),
    ("info absent.zarr", 4, "absent.zarr: no such store"),
    ("info .", 4, ".: a folder without an OME-Zarr image"),
    ("probe picture.png", 4, "picture.png: "),
    (f"probe {MODEL} --image absent.png", 4, "absent.png: "),
    (f"probe {MODEL} --plot absent/p.png", 2, "--plot absent/p.png: cannot be written"),
    (f"probe {MODEL} --plot p.doc", 2, "--plot p.doc: unknown suffix"),
    (f"model build --out m.bin --sr {MODEL}", 2, ".safetensors"),
    ("model build --out m.safetensors", 2, "--sr requires"),
    ("model build --out m.safetensors --sr absent.pth", 4, "absent.pth: "),
    (f"model build --out m.safetensors --sr {MODEL} --structure absent.safetensors", 4, "absent.safetensors"),
    ("train absent.jpg --out m.safetensors", 4, "absent.jpg: "),
    ("train picture.png --out m.safetensors", 4, "256"),
    ("train sr absent.jpg --out s.safetensors", 4, "absent.jpg: "),
    ("train structure absent.jpg --out s.safetensors", 4, "absent.jpg"),
    ("train structure picture.png --out s.safetensors", 4, "256"),
    ("train structure picture.png --out s.safetensors --precision x", 2, "--precision"),
    ("train structure picture.png --out s.safetensors --preset x", 2, "--preset"),
    ("train structure picture.png --out s.safetensors --config absent.toml", 4, "absent.toml"),
    ("train structure picture.png --out s.safetensors --iterations 0", 2, "iterations"),
    ("info 'a\nb.safetensors'", 4, "a b.safetensors"),
]


def test_refusals_are_one_line_and_write_nothing(engine, folder):
    before = snapshot(folder)
    failures = []
    for line, expected_code, words in REFUSALS:
        code, out, err = engine(line)
        shown = line.startswith("plan")  # a plan that does not fit is printed, then refused
        lines = [text for text in err.splitlines() if "measuring" not in text]  # once for each limit of memory
        one_line = len(lines) == 1 and lines[0].startswith("engine: ")
        if not (code == expected_code and one_line and words in err and (shown or out == "")):
            failures.append(f"{line!r}: exit code {code}, stderr {err!r}, stdout {out!r}")
        if snapshot(folder) != before:
            failures.append(f"{line!r}: changed {sorted(snapshot(folder).items() ^ before.items())}")
            break
    assert failures == []


def test_cuda_without_cuda(engine):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = engine(render("--device cuda"))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "--device cuda" in err


def test_full_disk_is_one_line(engine, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "out.zarr/0/c/0/0/0")

    monkeypatch.setattr("engine.io.zarr_store.ZarrSink.write", full)
    for executor in BOTH:
        code, _, err = engine(render(f"--executor {executor} --out {executor}.zarr"))
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


def test_out_of_memory_is_one_line(engine, monkeypatch):
    """In a network, by each executor, and in step 1."""
    for function, executor in (
        ("engine.archs.esrgan.RRDBNet.forward", "tiles"),
        ("engine.bands.segment.SegmentStream.push", "bands"),
        ("engine.measure.base_image", "tiles"),
        ("engine.measure.base_image", "bands"),
    ):
        for index, error in enumerate(OUT_OF_MEMORY):

            def fail(*_, error=error, **__):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(function, fail)
                code, _, err = engine(render(f"--executor {executor} --overwrite --out {index}.zarr"))
            is_device = isinstance(error, torch.OutOfMemoryError)
            if is_device and function.endswith("push"):  # strips are cut, where --tile allows it
                assert code == 3
                assert "strips of 16 px do not fit the device's memory" in err.splitlines()[-1]
                continue
            assert code == 1, error
            assert err.splitlines()[-1] == "engine: out of memory; use a smaller --memory or --tile"


def test_closed_pipe_is_silent(folder):
    with subprocess.Popen([SCRIPT, "info", MODEL], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# Results


def test_render_output_and_report(engine, folder):
    for executor in BOTH:
        code, out, err = engine(render(f"--report r.json --executor {executor} --overwrite"))
        assert code == 0
        first, second, third, result, look = out.splitlines()
        assert (
            first
            == "256x192, seed 0, from a base of 16x12 for this size, so the scene differs from other sizes, by model"
        )
        assert second.startswith(f"{executor}, fp32, seam error ")
        assert third.startswith("memory 0.")
        assert result.startswith("out.zarr: 256x192, in 0:0")
        assert "peak memory 0." in result
        assert look == "look at it: engine export out.zarr out.jpg"
        assert "engine:" not in err
        report = json.loads((folder / "r.json").read_text())
        assert report["plan"]["canvas"] == [192, 256]
        assert report["plan"]["seed"] == 0
        assert report["plan"]["executor"] == executor
        measured = report["measured"]
        assert measured["writes"] == 12
        parts = measured["compute_seconds"], measured["write_seconds"]
        assert min(parts) > 0
        assert (sum(parts) if executor == "tiles" else max(parts)) <= measured["seconds"]  # bands write in a thread
        assert measured["host_peak"] > 0
        assert report["projection"]["host"] > 0
        assert set(report["machine"]) == {"python", "platform", "cpu_count", "memory"}


def test_json_alone_on_stdout(engine, folder):
    code, out, _ = engine(render("--json --report r.json"))
    assert code == 0
    assert json.loads(out) == json.loads((folder / "r.json").read_text())
    for line in (f"plan {LARGE} --json", f"probe {MODEL} --json"):
        code, out, err = engine(line)
        assert code == 0
        assert json.loads(out)
        assert "engine:" not in err
    code, out, _ = engine("export out.zarr out.tif --json")
    assert code == 0
    assert json.loads(out)["width"] == 256


def test_info_json_is_the_manifest(engine, folder):
    code, out, err = engine(f"info {MODEL} --json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["path"] == MODEL
    assert shown["bytes"] == (folder / MODEL).stat().st_size
    assert [stage["weights"] for stage in shown["stages"]] == ["sr0", "sr0"]
    assert shown["stages"][0]["parameters"] > 0
    assert shown["structure"]["parameters"] > 0


def test_plan_writes_nothing(engine, folder):
    before = snapshot(folder)
    for line in (render("--dry-run"), render(command="plan"), render("--executor bands", command="plan")):
        code, out, _ = engine(line)
        assert code == 0, line
        assert (
            "256x192, seed 0, from a base of 16x12 for this size, so the scene differs from other sizes, by model"
            in out
        )
        assert snapshot(folder) == before
        assert engine(line.replace("out.zarr", "absent/deep/out.zarr"))[0] == 0
        assert snapshot(folder) == before


def test_plan_equals_dry_run_and_render(engine):
    for executor in BOTH:
        option = f"--executor {executor}"
        lines = (render(f"--dry-run {option}"), render(option, command="plan"))
        dry, plan = (json.loads(engine(f"{line} --json")[1]) for line in lines)
        for key in ("plan", "digest", "seam_error_levels"):
            assert dry[key] == plan[key]
        for key in ("host_parts", "tasks", "lr_pixels"):  # not the idle process and the free disk, measured each time
            assert dry["projection"][key] == plan["projection"][key]
        assert json.loads(engine(render(f"--json --overwrite {option}"))[1])["digest"] == plan["digest"]


def test_stores_and_seeds(engine, folder):
    """Stores of --count equal single renders; --dry-run leaves a store alone; --overwrite replaces it."""
    assert engine(render("--seed 6 --count 2"))[0] == 0
    assert not (folder / "out.zarr").exists()
    stores = [snapshot(folder / f"out-{seed}.zarr") for seed in (6, 7)]
    assert stores[0].keys() == stores[1].keys()
    shards = [path for path in stores[0] if "/c/" in path and stores[0][path]]
    assert shards
    assert all(stores[0][path] != stores[1][path] for path in shards)
    before = snapshot(folder)
    for flag in ("", "--resume", "--overwrite"):
        assert engine(render(f"--out out-7.zarr --dry-run {flag}"))[0] == 0
        assert snapshot(folder) == before
    for seed, expected in zip((6, 7), stores, strict=True):
        store = folder / f"out-{seed}.zarr"
        assert engine(render(f"--seed 5 --out {store.name} --overwrite"))[0] == 0
        assert snapshot(store) != expected
        assert engine(render(f"--seed {seed} --out {store.name} --overwrite"))[0] == 0
        assert snapshot(store) == expected


def test_missing_parent_folders_are_created(engine, folder):
    assert engine(render("--out a/b/out.zarr"))[0] == 0
    assert sorted(p.name for p in (folder / "a" / "b").iterdir()) == ["out.zarr"]


def test_probe_saves_to_the_model(engine, folder, model_file):
    (folder / "own.safetensors").write_bytes(model_file.read_bytes())
    code, out, _ = engine("probe own.safetensors --save")
    assert code == 0
    assert "step 3: " in out
    stored = json.loads(engine("info own.safetensors --json")[1])
    assert all(stage["profile"]["seam"] for stage in stored["stages"])
    assert "levels" in engine("info own.safetensors")[1]
    assert engine("probe picture.pth --save")[0] == 4


@pytest.mark.slow
def test_probe_plots(engine, folder):
    pytest.importorskip("matplotlib")
    for suffix in ("png", "svg"):
        assert engine(f"probe {MODEL} --plot seams.{suffix}")[0] == 0
        assert (folder / f"seams.{suffix}").stat().st_size > 5000


def test_build_prints_the_model(engine, folder, model_file):
    checkpoint = model_file.parent / "sr.safetensors"
    code, out, _ = engine(f"model build --out new.safetensors --sr {checkpoint} --licence MIT")
    assert code == 0
    assert "licence: MIT: sr.safetensors" in out
    assert engine(f"model build --out coloured.safetensors --sr {checkpoint} --licence '\x1b[31mMIT'")[0] == 0
    assert "licence: \\x1b[31mMIT: sr.safetensors\n" in engine("info coloured.safetensors")[1]
    assert (folder / "new.safetensors").is_file()


def test_tables_are_greppable(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    name = "a [red]name[/red] :smile: " * 20
    print_table(("image", "PSNR"), [(name, "30.00 dB"), ("b", "1 dB")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == [
        "image".ljust(len(name)) + "  PSNR",
        f"{name}  30.00 dB",
        "b".ljust(len(name)) + "  1 dB",
    ]


# Start


def test_help_is_quick_and_imports_no_torch(tmp_path):
    code = (
        "import sys\nfrom engine.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    seconds = []
    for arguments in ([], ["--help"], ["render", "--help"]):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: engine")
        assert not {"torch", "zarr", "numpy", "pyvips"} & set(done.stderr.split())
    assert min(seconds) < 1.0  # the best of three: the machine may be busy


def test_console_script_and_module():
    for command in ([SCRIPT], [sys.executable, "-m", "engine"]):
        environment = {**os.environ, "COLUMNS": "20"}
        line = [*command, "render", "--out", "out.zarr", "--size", "big"]
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("engine: --size big: ")
        assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_before_the_render_is_one_line(engine, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.cli.render.chain", interrupted)
    code, out, err = engine(render())
    assert (code, out) == (130, "")
    assert err == "engine: interrupted before the render began; nothing was written\n"


def test_openmp_spins_briefly_unless_set():
    """Set before torch, which reads it when it is loaded."""
    program = (
        "import os, sys\nfrom engine.cli import app\n"
        "try: app.main(['--version'])\nexcept SystemExit: pass\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for variables, spins in (
        ({}, str(SPIN_COUNT)),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
    ):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"{spins} False"


# Models by name and by default


@pytest.mark.weights
def test_pictures_are_enlarged_by_realsr_by_default(engine):
    """The default model's enlargements are tuned to one photograph and would recolour others."""
    for words in ("plan --init picture.png --json", "plan realsr --init picture.png --json"):
        code, out, _ = engine(f"{words} --precision fp32")
        assert code == 0
        plan = json.loads(out)["plan"]
        assert plan["canvas"] == [96, 128]
        assert plan["model_digest"] == load("realsr").digest
    assert engine("info realsr")[0] == 0


def test_pictures_without_realsr_ask_for_a_model(engine, monkeypatch):
    def missing(name):
        raise ModelError(f"{name}: not installed")

    monkeypatch.setattr("engine.model.packaged.find_packaged", missing)
    code, _, err = engine("render --init picture.png --out out.zarr")
    assert code == 2
    assert err == (
        "engine: picture.png: no model to enlarge it with; name a checkpoint, or get RealSR, the default: "
        "engine weights fetch realsr\n"
    )


def test_theory_of_the_packaged_models(call):
    for name in ("picosdeeuropa", "life"):
        code, out, _ = call(f"plan {Path(__file__).parents[2] / 'models' / name}.safetensors --theory --json")
        assert code == 0
        assert json.loads(out)["structure"]["parameters"] > 1_000_000
