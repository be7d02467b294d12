"""``engine check``: damage is found, and ``--repair`` with ``render --resume`` makes equal files again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.damage import DAMAGE, flip, replaced_by_folder
from zarr.codecs import BloscCodec

from engine.io.files import Lock

RENDER = "render model.safetensors --size 96x64 --stages 1 --overlap 4 --precision fp32 --executor tiles --tile 8"
OUT = "s.zarr"
SHARDS = ("0/c/0/0/1", "0/c/0/1/2", "1/c/0/0/0")


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def material(tmp_path_factory, model_file):
    folder = tmp_path_factory.mktemp("check")
    shutil.copy(model_file, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(material, monkeypatch, call):
    """Working folder with a finished store of 3 levels, of which a copy may be damaged."""
    monkeypatch.chdir(material)
    if not Path("whole.zarr").exists():
        assert call(f"{RENDER} --out {OUT}")[0] == 0
        Path(OUT).rename("whole.zarr")
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree("whole.zarr", OUT)
    return material


def test_an_intact_store(folder, call):
    before = files(Path(OUT))
    code, out, err = call(f"check {OUT} -q")
    assert (code, err) == (0, "")
    assert out == f"{OUT}: 9 shards, all intact\n"
    assert files(Path(OUT)) == before


def test_every_flipped_bit_is_found_by_check_and_export(folder, call):
    """One of 200 random bits of the shards, each in turn; a bit of the 200 that passes would be a wrong pixel."""
    random = np.random.default_rng(0)
    shards = sorted(p for p in Path(OUT).rglob("c/*/*/*") if p.is_file())
    passed = []
    for number in range(200):
        shard = shards[random.integers(len(shards))]
        bit = int(random.integers(8 * shard.stat().st_size))
        flip(shard, bit)
        code, out, err = call(f"check {OUT} -q")
        if code != 4 or f"{shard}: " not in out or len(err.splitlines()) != 1:
            passed.append((shard, bit, out, err))
        if number < 10 and shard.parts[1] == "0":
            code, _, err = call(f"export {OUT} x.png -q")
            assert (code, len(err.splitlines())) == (4, 1)
            assert f"run engine check {OUT} --repair" in err
            assert not Path("x.png").exists()
        flip(shard, bit)
    assert passed == []


@pytest.mark.parametrize(
    ("shard", "other"), [("0/c/0/0/1", "0/c/0/0/0"), ("0/c/0/1/2", "0/c/0/0/0"), ("1/c/0/0/0", "1/c/0/0/1")]
)
@pytest.mark.parametrize("exchanged", [False, True], ids=["flipped", "exchanged"])
def test_what_only_reading_shows_is_repaired(folder, call, shard, other, exchanged):
    """A flipped bit, and another shard with correct checksums: found, removed, and rendered again to the same byte."""
    if exchanged:
        shutil.copy(Path(OUT) / other, Path(OUT) / shard)
    else:
        flip(Path(OUT) / shard, 800)
    code, out, err = call(f"check {OUT} --json -q")
    assert (code, len(err.splitlines())) == (4, 1)
    account = json.loads(out)
    assert str(Path(OUT) / shard) in [entry["file"] for entry in account["damaged"]]
    assert all(entry["width"] > 0 and entry["problem"] for entry in account["damaged"])
    code, out, err = call(f"check {OUT} --repair -q")
    assert (code, err) == (0, "")
    assert "removed, give its engine render --resume" in out
    assert call(f"export {OUT} x.png -q")[0] == 4
    assert call(f"{RENDER} --out {OUT} --resume -q")[0] == 0
    assert files(Path(OUT)) == files(Path("whole.zarr"))


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_resume_finds_damaged_files(folder, call, name, finished):
    """A store is not believed to be complete because it says so: what its files show is rendered again."""
    if not finished:
        root = Path(OUT) / "zarr.json"
        root.write_text(root.read_text().replace('"complete": true', '"complete": false'))
    for shard in SHARDS:
        DAMAGE[name](Path(OUT) / shard)
    assert call(f"check {OUT} -q")[0] == (0 if name == "missing" and not finished else 4)
    assert call(f"export {OUT} x.png -q")[0] == 4
    code, _, err = call(f"{RENDER} --out {OUT} --resume")
    assert code == 0
    assert ("3 shards missing or damaged; rendered again" in err) == (finished or name != "missing")
    assert files(Path(OUT)) == files(Path("whole.zarr"))


def test_a_folder_with_files_is_kept(folder, call):
    shard = Path(OUT) / SHARDS[0]
    replaced_by_folder(shard)
    (shard / "thesis.txt").write_text("years of work")
    for command in (f"check {OUT} --repair", f"{RENDER} --out {OUT} --resume", f"{RENDER} --out {OUT} --overwrite"):
        code, _, err = call(f"{command} -q")
        assert code == 4, command
        assert len(err.splitlines()) == 1
    assert (shard / "thesis.txt").read_text() == "years of work"


def test_a_store_without_checksums(folder, call):
    """Stores of earlier versions open, export, and are compared level with level."""
    for level in ("0", "1", "2")[: len(list(Path(OUT).glob("[0-9]")))]:
        old = zarr.open_array(Path(OUT) / level)
        pixels = old[:]
        shutil.rmtree(Path(OUT) / level)
        array = zarr.create_array(
            Path(OUT) / level, shape=old.shape, shards=old.shards, chunks=old.chunks, dtype="uint8", fill_value=0,
            compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=1), dimension_names=["c", "y", "x"],
            config={"write_empty_chunks": True},
        )  # fmt: skip
        array[:] = pixels
    assert call(f"check {OUT} -q")[0] == 0
    assert call(f"export {OUT} old.png --overwrite -q")[0] == 0
    (Path(OUT) / SHARDS[0]).unlink()
    assert call(f"{RENDER} --out {OUT} --resume -q")[0] == 0
    assert np.array_equal(zarr.open_array(f"{OUT}/0")[:], zarr.open_array("whole.zarr/0")[:])
    array = zarr.open_array(f"{OUT}/0")
    array[:, :32, :32] = 255 - array[:, :32, :32]
    code, out, _ = call(f"check {OUT} -q")
    assert code == 4
    assert "differs from the shard computed from it" in out


def test_refusals(folder, call):
    Path("folder").mkdir(exist_ok=True)
    for name, words in (("nothing", "no such store"), ("folder", "not a store"), ("model.safetensors", "not a store")):
        code, _, err = call(f"check {name}")
        assert (code, len(err.splitlines())) == (4, 1)
        assert words in err
    lock = Lock.take(Path(OUT))
    code, _, err = call(f"check {OUT}")
    assert (code, len(err.splitlines())) == (4, 1)
    assert "is being written by another process" in err
    lock.release()
    metadata = Path(OUT) / "0" / "zarr.json"
    text = metadata.read_text()
    for change in (text[:50], "[]", text.replace('"blosc"', '"gzip"'), text.replace("96", "95")):
        metadata.write_text(change)
        before = files(Path(OUT))
        code, _, err = call(f"check {OUT} --repair")
        assert (code, len(err.splitlines())) == (4, 1), change
        assert files(Path(OUT)) == before
