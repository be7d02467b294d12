"""``export``: refusals, results, and files that appear whole or not at all."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import engine.exporters as exporters
from engine.errors import BudgetError, EngineError, InputError, UsageError
from engine.exporters import export

NAMES = ["a.tif", "a.ome.tif", "a.png", "a.jpg", "a.webp", "a.dzi", "a.dzi.zip", "a.iiif", "a.ozx"]
if importlib.util.find_spec("OpenImageIO"):
    NAMES.append("a.exr")
if (Path(exporters.__file__).parents[1] / "view" / "static" / "app.js").is_file():
    NAMES += ["a.html", "a.html.zip"]

TOGETHER = {"a.dzi": ["a.dzi", "a_files"], "a.html": ["a.html", "a_page"]}
"""Names that one export makes, where it is not its own alone."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tree_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_result_progress_and_estimate(store, tmp_path):
    from engine.exporters.pyramid import Pyramid
    from engine.exporters.view import View

    for name in NAMES:
        calls, folder = [], tmp_path / f"folder-{name}"
        folder.mkdir()
        result = export(store, folder / name, on_progress=lambda done, total, calls=calls: calls.append((done, total)))
        assert result.path == folder / name
        assert result.bytes == tree_bytes(folder) > 0
        assert (result.width, result.height) == (1037, 531)
        assert result.seconds > 0
        assert calls == sorted(calls), name
        assert calls[-1][0] == calls[-1][1] > 0
        assert names(folder) == TOGETHER.get(name, [name])
        suffix = exporters.find_suffix(result.path)
        module = importlib.import_module(f"engine.exporters.{exporters.FORMATS[suffix].module}")
        view = View(Pyramid(store), folder=tmp_path)
        job = module.prepare(view, suffix, {})
        assert (view.width, view.height, len(view.levels)) == (result.width, result.height, result.levels)
        assert result.bytes <= 1.01 * job.estimate, name


@pytest.mark.parametrize("name", NAMES)
def test_failures_and_interrupts_leave_nothing(store, tmp_path, broken_reads, name):
    if name != "a.ozx":  # which decodes nothing
        with pytest.raises(InputError, match="injected"):
            export(store, tmp_path / name)
        assert names(tmp_path) == ["out.zarr"]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / name, on_progress=stop)
    assert names(tmp_path) == ["out.zarr"]


@pytest.mark.parametrize("name", ["a.dzi", "a.iiif"])
def test_an_existing_folder_is_kept_or_replaced_whole(store, tmp_path, name):
    out = tmp_path / name
    export(store, out, tile=128)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"exists; give overwrite=True"):
        export(store, out)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, out, overwrite=True, on_progress=stop)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert export(store, out, tile=256, overwrite=True).bytes == sum(
        tree_bytes(path) if path.is_dir() else path.stat().st_size for path in tmp_path.iterdir() if path != store
    )
    assert names(tmp_path) == sorted([*TOGETHER.get(name, [name]), "out.zarr"])


def test_folders_of_the_user_are_never_replaced(store, tmp_path):
    for name in ("a.iiif", "a_files"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    for name in ("a.iiif", "a.dzi"):
        with pytest.raises(InputError, match="with other files"):
            export(store, tmp_path / name, overwrite=True)
    assert names(tmp_path) == ["a.iiif", "a_files", "out.zarr"]


@pytest.mark.parametrize("name", ["a.dzi", "a.dzi.zip", "a.iiif"])
def test_a_killed_export_leaves_no_export(store, tmp_path, name):
    """SIGKILL in the middle; the next export of that name removes what is left."""
    code = (
        "import os, signal, sys\n"
        "from engine.exporters import export\n"
        "export(sys.argv[1], sys.argv[2], on_progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert subprocess.run([sys.executable, "-c", code, store, tmp_path / name]).returncode == -9
    assert [n for n in names(tmp_path) if not n.startswith(".")] == ["out.zarr"]
    export(store, tmp_path / name)
    assert names(tmp_path) == sorted([*TOGETHER.get(name, [name]), "out.zarr"])


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_an_existing_file_is_kept_or_replaced_whole(store, tmp_path, broken_reads, name):
    out = tmp_path / name
    out.write_bytes(b"before")
    with pytest.raises(InputError, match=r"exists; give overwrite=True") as caught:
        export(store, out)
    assert "give --overwrite or" in caught.value.for_command_line()
    with pytest.raises(InputError):
        export(store, out, overwrite=True)
    assert out.read_bytes() == b"before"  # a failed export costs nothing
    assert export(store, out, overwrite=True).bytes == out.stat().st_size > 6


def test_suffixes(store, tmp_path):
    for name in ("a.bmp", "a", "tif", ".part"):
        with pytest.raises(UsageError, match=r"choose one of \.tif, \.tiff, \.ome\.tif, \.ome\.tiff, \.png, \.jpg"):
            export(store, tmp_path / name)
    with pytest.raises(UsageError, match="format: 'bmp' is unknown; choose one of tif, tiff"):
        export(store, tmp_path / "a", format="bmp")
    assert names(export(store, tmp_path / "a", format="iiif").path)[-1] == "info.json"
    assert exporters.find_suffix(Path("A.OME.TIF")) == ".ome.tif"
    assert exporters.find_suffix(Path("a.dzi.zip")) == ".dzi.zip"
    assert exporters.find_suffix(Path("some.tif")) == ".tif"


def test_target_folders(store, tmp_path):
    assert export(store, tmp_path / "missing" / "folder" / "a.tif").path.is_file()
    (tmp_path / "b.tif").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        export(store, tmp_path / "b.tif", overwrite=True)
    with pytest.raises(InputError, match=r"a\.tif is not a folder"):
        export(store, tmp_path / "missing" / "folder" / "a.tif" / "b.tif")
    with pytest.raises(UsageError, match="lies in the store"):
        export(store, store / "a.png")


def test_a_quality_that_the_format_lacks_is_refused(store, tmp_path):
    for name in ("a.png", "a.tif", "a.ome.tif"):
        with pytest.raises(UsageError, match="quality"):
            export(store, tmp_path / name, quality=80)
    assert export(store, tmp_path / "b.tif", quality=80, compression="jpeg").bytes > 0


def test_a_full_disk_is_refused_before_writing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for name in NAMES:
        with pytest.raises(BudgetError, match=r"about \d+ bytes needed, 1000 free"):
            export(store, tmp_path / name)
    assert names(tmp_path) == ["out.zarr"]


@pytest.fixture
def small_files():
    """Files may have 20 kB at most, as on a disk that fills."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_while_writing(store, tmp_path, small_files):
    for name in [n for n in NAMES if n not in ("a.dzi", "a.iiif", "a.html", "a.webp")]:  # small files
        with pytest.raises(EngineError, match=r"File too large|could not (be )?writ") as caught:
            export(store, tmp_path / name)
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["out.zarr"]


def test_files_of_the_user_are_not_touched(store, tmp_path):
    """Names that an export of another version used, and a link at one of them."""
    victim, folder = tmp_path / "victim.txt", tmp_path / "a.png.part"
    victim.write_text("years of work")
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    (tmp_path / "a.tif.part").symlink_to(victim)
    for name in ("a.tif", "a.png"):
        assert not export(store, tmp_path / name).path.is_symlink()
    assert victim.read_text() == (folder / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["a.png", "a.png.part", "a.tif", "a.tif.part", "out.zarr", "victim.txt"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fate", ["deleted", "renamed", "replaced", "a shard lost"])
def test_a_store_that_goes_while_it_is_exported(store, tmp_path, levels, write_store, small_cells, name, fate):
    """At the first report of progress: one line, and no file."""
    other = write_store(tmp_path / "other.zarr", levels, ourgan={"complete": True, "plan": {"seed": 8}})
    begun = []

    def on_progress(done, total):
        if begun:
            return
        begun.append(done)
        if fate == "deleted":
            shutil.rmtree(store)
        elif fate == "a shard lost":
            (store / "0" / "c" / "0" / "2" / "0").unlink()
        else:
            store.rename(tmp_path / "aside.zarr")
            if fate == "replaced":
                other.rename(store)

    with pytest.raises(
        InputError, match="missing shard; run" if fate == "a shard lost" else "removed, renamed or replaced"
    ):
        export(store, tmp_path / name, on_progress=on_progress)
    assert begun
    assert not [n for n in names(tmp_path) if not n.endswith(".zarr")]


def test_an_incomplete_store(tmp_path, levels, write_store):
    store = write_store(tmp_path / "a.zarr", levels, ourgan={"complete": False})
    with pytest.raises(InputError, match="not finished"):
        export(store, tmp_path / "a.tif")
    assert export(store, tmp_path / "a.tif", allow_incomplete=True).width == 1037


def test_imports():
    """Formats are imported on request; torch never is."""

    def run(code):
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert not {"numpy", "pyvips", "tifffile", "zarr"} & set(run("import sys, engine.exporters; print(*sys.modules)"))
    modules = "engine.exporters, engine.exporters.pyramid, engine.exporters.tiff, engine.exporters.preview"
    assert run(f"import sys, {modules}; print('torch' in sys.modules)") == ["False"]
