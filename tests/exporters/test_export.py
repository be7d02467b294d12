"""The door: what is refused, what is reported, and that a file appears whole or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import engine.exporters as exporters
from engine.errors import BudgetError, EngineError, InputError, UsageError
from engine.exporters import export

NAMES = ["a.tif", "a.ome.tif", "a.png", "a.jpg", "a.webp"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_result_and_progress(store, tmp_path, name):
    seen = []
    result = export(store, tmp_path / name, on_progress=lambda done, total: seen.append((done, total)))
    assert result.path == tmp_path / name
    assert result.bytes == result.path.stat().st_size > 0
    assert (result.width, result.height) == (1037, 531)
    assert result.seconds > 0
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
    assert names(tmp_path) == [name, "out.zarr"]


@pytest.mark.parametrize("name", NAMES)
def test_failure_midway_leaves_nothing(store, tmp_path, broken_reads, name):
    with pytest.raises(InputError, match="injected"):
        export(store, tmp_path / name)
    assert names(tmp_path) == ["out.zarr"]


@pytest.mark.parametrize("name", NAMES)
def test_interrupt_leaves_nothing(store, tmp_path, name):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / name, on_progress=stop)
    assert names(tmp_path) == ["out.zarr"]


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_existing_output(store, tmp_path, broken_reads, name):
    out = tmp_path / name
    out.write_bytes(b"before")
    with pytest.raises(UsageError, match="exists .6 bytes.: pass overwrite=True"):
        export(store, out)
    with pytest.raises(InputError):
        export(store, out, overwrite=True)
    assert out.read_bytes() == b"before"  # a failed export costs nothing
    assert export(store, out, overwrite=True).bytes == out.stat().st_size > 6


@pytest.mark.parametrize("name", ["a.bmp", "a", "tif", ".part"])
def test_unknown_suffix_lists_the_known(store, tmp_path, name):
    with pytest.raises(UsageError, match=r"choose one of \.tif, \.tiff, \.ome\.tif, \.ome\.tiff, \.png, \.jpg"):
        export(store, tmp_path / name)


def test_suffix_in_any_case_and_the_longest_first():
    assert exporters.find_suffix(SimpleNamespace(name="A.OME.TIF", suffix=".TIF")) == ".ome.tif"
    assert exporters.find_suffix(SimpleNamespace(name="some.tif", suffix=".tif")) == ".tif"


def test_target_folders(store, tmp_path):
    with pytest.raises(UsageError, match="does not exist: create it"):
        export(store, tmp_path / "missing" / "a.tif")
    (tmp_path / "b.tif").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        export(store, tmp_path / "b.tif", overwrite=True)


def test_full_disk_is_refused_before_writing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for name in NAMES:
        with pytest.raises(BudgetError, match=r"about \d+ bytes needed, 1000 free"):
            export(store, tmp_path / name)
    assert names(tmp_path) == ["out.zarr"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_disk_that_fills_while_writing(store, tmp_path, name):
    (tmp_path / f"{name}.part").symlink_to("/dev/full")
    with pytest.raises(EngineError, match=r"No space left on device|could not write") as caught:
        export(store, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["out.zarr"]


@pytest.mark.parametrize("name", NAMES)
def test_estimate_is_an_upper_bound_here(store, tmp_path, name):
    from engine.exporters import preview, tiff
    from engine.exporters.pyramid import Pyramid

    suffix = exporters.find_suffix(tmp_path / name)
    module = {"tiff": tiff, "preview": preview}[exporters.FORMATS[suffix]]
    estimate = module.prepare(Pyramid(store), suffix, {}).estimate
    assert export(store, tmp_path / name).bytes <= estimate * 1.01


def test_incomplete_store(tmp_path, levels, write_store):
    store = write_store(tmp_path / "a.zarr", levels, ourgan={"complete": False})
    with pytest.raises(InputError, match="not finished"):
        export(store, tmp_path / "a.tif")
    assert export(store, tmp_path / "a.tif", allow_incomplete=True).width == 1037


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_exporters_never_import_torch():
    modules = "engine.exporters, engine.exporters.pyramid, engine.exporters.tiff, engine.exporters.preview"
    assert run(f"import sys, {modules}; print('torch' in sys.modules)") == ["False"]


def test_formats_are_imported_when_asked_for():
    heavy = {"numpy", "pyvips", "tifffile", "zarr"}
    assert not heavy & set(run("import sys, engine.exporters; print(*sys.modules)"))
