"""Stores, pictures and models by URL, on servers on this machine, with and without faults and kills.

Amazon's and those of Azure and Google, where they are installed (``support.object_store``).
"""

import json
import os
import shutil
import signal
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from support.commands import finish, start
from support.damage import flip
from support.object_store import (
    AZURE_KEY,
    FAULTS,
    KEY,
    SECRET,
    SERVERS,
    FaultyProxy,
    address,
    every_other,
    make_bucket,
    stored,
    upload,
)
from support.stores import files

import engine
from engine.errors import InputError, ResumeError
from engine.io import objects
from engine.io.provenance import stored_provenance
from engine.job import Job
from engine.plan.request import Request
from engine.view.store import StoreSource

pytest.importorskip("obstore")
pytestmark = pytest.mark.slow

RENDER = "render {model} --size 96x64 --overlap 4 --precision fp32 --tile 8 -q"


@pytest.fixture(scope="module", params=["s3", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("az", "gs"))])
def kind(request):
    """Scheme of the object store's URLs."""
    return request.param


@pytest.fixture(scope="module")
def server(kind):
    """Port of the object store, which has one bucket."""
    with SERVERS[kind]() as port:
        make_bucket(port, "bucket", kind)
        yield port


@pytest.fixture(scope="module")
def bucket(kind):
    """URL of the bucket."""
    return f"{kind}://bucket"


@pytest.fixture
def proxy(kind, server, monkeypatch):
    """The proxy of faults, which all requests of the test pass; it begins without faults."""
    proxy = FaultyProxy(server)
    _use(monkeypatch, kind, proxy.server_port)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture(scope="module")
def material(server, bucket, tmp_path_factory, model_file):
    """Folder with a.zarr (tiles), b.zarr (bands), half.zarr, bad.zarr, model.safetensors and a.png, also in the bucket."""
    folder = tmp_path_factory.mktemp("cloud")
    shutil.copy(model_file, folder / "model.safetensors")
    options = {"overlap": "4", "precision": "fp32"}
    engine.render(model_file, folder / "a.zarr", size="768x512", tile="64", executor="tiles", **options)
    engine.render(model_file, folder / "b.zarr", size="160x1100", executor="bands", **options)
    for name in ("half", "bad"):
        shutil.copytree(folder / "a.zarr", folder / f"{name}.zarr")
    root = folder / "half.zarr/zarr.json"
    metadata = json.loads(root.read_text())
    metadata["attributes"]["ourgan"]["complete"] = False
    root.write_text(json.dumps(metadata))
    (folder / "half.zarr/0/c/0/0/1").unlink()
    flip(folder / "bad.zarr/0/c/0/0/1", 4000)
    engine.export(folder / "a.zarr", folder / "a.png")
    for path in folder.iterdir():
        upload(path, f"{bucket}/{path.name}")
    return folder


def _use(monkeypatch, kind, port):
    monkeypatch.setenv(*address(kind, port))
    monkeypatch.setattr(objects, "_PAUSE", 0.01)
    monkeypatch.setattr(objects, "_BACKOFF", 0.01)


@pytest.mark.parametrize("size", [3, 6 << 20])
def test_a_put_keeps_its_condition(server, bucket, size):
    """What one writer of a store relies on, also where obstore would divide an object that has no condition."""
    place, first, second = objects.as_place(f"{bucket}/conditions/{size}"), b"1" * size, b"2" * size
    assert place.head() is None
    assert not place.write_over(first, {"e_tag": '"0"', "version": "1"})
    assert place.write_new(first, {"mark": "one"})
    assert place.write_new(first)  # as where an answer was lost
    assert not place.write_new(second)
    version = place.head()
    assert version["attributes"]["mark"] == "one"
    assert place.read_range(1, 3, version["e_tag"]) == b"11"
    assert place.write_over(second, version)
    assert not place.write_over(first, version)
    assert place.read_bytes() == second
    with pytest.raises(InputError, match="replaced while it was read"):
        place.read_range(1, 3, version["e_tag"])
    assert place.write_over(first, attributes={"mark": "two"})
    assert (place.read_bytes(), place.head()["attributes"]["mark"]) == (first, "two")


def test_an_object_that_is_gone_keeps_no_other_from_deletion(server, bucket):
    place = objects.as_place(f"{bucket}/deleted")
    for name in ("a", "b/c", "d e"):
        assert (place / name).write_new(b"1")
    assert [name for name, _ in place.objects()] == ["a", "b/c", "d e"]
    place.delete(["none", "a", "b/c", "nothing", "d e"])
    assert not place.exists()


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_store_by_url_is_read_as_its_folder(name, material, bucket, call, tmp_path):
    """Tiles and bands, two steps: pixels of every level, exports, check and info."""
    local, url = material / f"{name}.zarr", f"{bucket}/{name}.zarr"
    here, there = engine.open(local), engine.open(url)
    assert there.levels == here.levels
    assert there.provenance == here.provenance
    for level in range(len(here.levels)):
        assert np.array_equal(there.read(level=level), here.read(level=level))
    assert np.array_equal(there.thumbnail(64), here.thumbnail(64))
    for suffix in ("tif", "png"):
        code, out, error = call(f"export {url} {tmp_path}/there.{suffix} -q")
        assert (code, error) == (0, ""), out
        engine.export(local, tmp_path / f"here.{suffix}")
        assert (tmp_path / f"there.{suffix}").read_bytes() == (tmp_path / f"here.{suffix}").read_bytes()
    there_out, here_out = call(f"check {url} -q")[1], call(f"check {local} -q")[1]
    assert there_out == here_out.replace(str(local), url)
    assert "all intact" in there_out
    accounts = [json.loads(call(f"info {place} --json")[1]) for place in (url, local)]
    assert {**accounts[0], "path": ""} == {**accounts[1], "path": ""}
    source = StoreSource(objects.as_place(url))
    assert source.state.complete
    assert source.state.finished.all()
    assert np.array_equal(source.tile(0, 0, 0).pixels, StoreSource(local).tile(0, 0, 0).pixels)


def test_damaged_and_unfinished_stores(material, bucket, call, tmp_path):
    code, out, _ = call(f"check {bucket}/bad.zarr -q")
    assert code == 4
    assert f"{bucket}/bad.zarr/0/c/0/0/1: wrong checksum" in out
    code, _, error = call(f"export {bucket}/bad.zarr {tmp_path}/bad.tif -q")
    assert (code, error.count("\n")) == (4, 1)
    assert f"{bucket}/bad.zarr/0/c/0/0/1: damaged shard" in error
    code, _, error = call(f"export {bucket}/half.zarr {tmp_path}/half.tif -q")
    assert code == 4
    assert not list(tmp_path.iterdir())
    assert not StoreSource(objects.as_place(f"{bucket}/half.zarr")).state.finished.all()
    code, _, error = call(f"export {bucket}/a.zarr {tmp_path}/a.ozx -q")
    assert (code, "copy the store" in error) == (2, True)
    for url in (f"{bucket}/none.zarr", bucket.replace("bucket", "nobucket") + "/a.zarr"):
        assert [call(f"{command} {url}")[0] for command in ("check", "info")] == [4, 4]


def test_picture_and_model_by_url(material, bucket, call, tmp_path):
    """The store equals that of local files, but for the command that it would be continued with."""
    for place, out in ((material, "here"), (bucket, "there")):
        options = "--init {p}/a.png --roi 0,0,64,64 --stages 1 --overlap 4 --precision fp32".replace("{p}", str(place))
        code, _, error = call(f"render {place}/model.safetensors {options} --out {tmp_path}/{out}/a.zarr -q")
        assert code == 0, error
    assert files(tmp_path / "there") == files(tmp_path / "here")
    shown = [call(f"info {place}/a.png --json")[1] for place in (bucket, material)]
    assert json.loads(shown[0])["path"] == f"{bucket}/a.png"
    assert json.loads(shown[0])["width"] == json.loads(shown[1])["width"]


def test_a_hundred_faults_change_nothing(material, bucket, proxy, call, tmp_path):
    """Every second of equal requests fails, in five ways: what is read is right, and no request is repeated without end."""
    proxy.choose = every_other()
    runs = 0
    while sum(proxy.injected.values()) < 100:
        runs += 1
        code, _, error = call(f"export {bucket}/a.zarr {tmp_path}/{runs}.tif -q")
        assert (code, error) == (0, "")
        code, out, error = call(f"check {bucket}/a.zarr -q")
        assert (code, error) == (0, "")
        assert out.endswith("all intact\n")
    engine.export(material / "a.zarr", tmp_path / "here.tif")
    assert all((tmp_path / f"{n}.tif").read_bytes() == (tmp_path / "here.tif").read_bytes() for n in range(1, runs + 1))
    assert min(proxy.injected[kind] for kind in FAULTS) >= 15


@pytest.mark.parametrize("fault", ["503", "torn"])
def test_a_lasting_fault_ends_in_one_line(fault, material, bucket, proxy, call, tmp_path):
    """Good at first, then failing without end."""
    proxy.choose = lambda seen, total: fault if total >= 5 else None
    code, _, error = call(f"export {bucket}/a.zarr {tmp_path}/a.tif -q")
    assert (code, error.count("\n")) == (1, 1), error
    assert "check the network and repeat this command" in error
    assert proxy.requests < 100
    assert not list(tmp_path.iterdir())


def test_no_credentials_in_any_file_or_output(kind, material, bucket, call, tmp_path, monkeypatch):
    texts = [call(f"check {bucket}/a.zarr --json")[1:], call(f"check s3://{KEY}:{SECRET}@bucket/a.zarr")[1:]]
    monkeypatch.setenv("ENGINE_TRACEBACK", "1")
    code, out, error = call(
        f"render {bucket}/model.safetensors --size 96x64 --out {tmp_path}/a.zarr --dry-run --verbose"
    )
    texts.append((out, error))
    half = tmp_path / "half.zarr"
    assert call(f"{RENDER.format(model=f'{bucket}/model.safetensors')} --out {half}")[0] == 0
    _use(monkeypatch, kind, 9)
    texts.append(call(f"check {bucket}/a.zarr"))
    shown = repr(texts) + "".join(p.read_bytes().decode("latin-1") for p in Path(tmp_path).rglob("*") if p.is_file())
    assert not [secret for secret in (KEY, SECRET, AZURE_KEY) if secret in shown]


TILES = "--size 768x512 --tile 64 --executor tiles --overlap 4 --precision fp32"
BANDS = "--size 160x1100 --executor bands --overlap 4 --precision fp32"


def contents(folder):
    """Bytes of every file of a store."""
    return {name: data for name, data in files(folder).items() if data is not None}


@pytest.fixture
def out(request, bucket):
    """URL of a store that is not there, whose name, which it records, is that of the local one."""
    return f"{bucket}/{request.function.__name__}/a.zarr"


def test_a_store_is_rendered_to_a_url(material, proxy, out, call, tmp_path, monkeypatch):
    """In tiles: the objects are the files of a local render, though requests fail, and nothing is left in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    proxy.choose = every_other()
    line = f"render {material}/model.safetensors {TILES} --out {out} -q"
    assert call(line)[::2] == (0, "")
    proxy.choose = lambda seen, total: None
    assert sum(proxy.injected.values()) > 30
    assert stored(out) == contents(material / "a.zarr")
    assert [call(line)[0], call(f"{line} --resume")[0]] == [4, 0]
    assert not list(tmp_path.rglob("stores/*"))


def test_parts_are_rendered_to_a_url(material, bucket, proxy, call, tmp_path, monkeypatch):
    """In bands, on a machine each: the rest of the pyramid is made where the parts are, though requests fail."""
    proxy.choose, out = every_other(), f"{bucket}/parts/b.zarr"
    for part in (2, 1):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(part)))
        line = f"render {material}/model.safetensors {BANDS} --part {part}/2 --out {out} -q"
        assert call(line)[::2] == (0, "")
        assert call(f"finish {out}")[0] == (4 if part == 2 else 0)
    proxy.choose = lambda seen, total: None
    assert stored(out) == contents(material / "b.zarr")
    assert not list(tmp_path.rglob("*.scratch"))


def test_a_killed_render_is_resumed(material, proxy, out, tmp_path):
    """Killed while it puts its second shard, which may arrive: the end has the bytes of an undisturbed run."""
    words = f"render {material}/model.safetensors {TILES} --out {out} --resume -q"
    running, puts, code = [], [], None

    def watch(command, path):
        if command == "PUT" and "/c/0/" in unquote(path):
            puts.append(path)
            if len(puts) == 2:
                os.kill(running[-1].pid, signal.SIGKILL)

    proxy.watch = watch
    while code != 0:
        running.append(start(tmp_path, words))
        code, error = finish(running[-1])
        assert code in (0, -signal.SIGKILL), error
    assert len(running) == 2
    assert stored(out) == contents(material / "a.zarr")


@pytest.mark.long
@pytest.mark.parametrize(("name", "options"), [("a", TILES), ("b", BANDS)], ids=["tiles", "bands"])
def test_workers_render_to_a_url(material, out, call, monkeypatch, name, options):
    """The objects of two workers are the files of one local render."""
    pytest.importorskip("distributed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = f"render {material}/model.safetensors {options} --dask local:2 --shares 2 -q"
    assert call(f"{line} --out {out.replace('a.zarr', f'{name}.zarr')}")[::2] == (0, "")
    assert stored(out.replace("a.zarr", f"{name}.zarr")) == contents(material / f"{name}.zarr")


@pytest.fixture
def begun(material, out):
    """A render to ``out`` that stopped after its first shard."""
    request = Request(size=(768, 512), tile=64, executor="tiles", overlap="4", precision="fp32")
    job = Job.prepare(material / "model.safetensors", request, out)
    sink = job.open_sink()
    run = job.run(sink)
    next(run)
    run.close()
    assert 0 < len(stored(out)) < len(contents(material / "a.zarr"))
    return job


def test_of_two_writers_the_earlier_one_stops(begun, out, material, tmp_path, monkeypatch):
    """A lock keeps a second process of this machine away; one of another machine takes the store over."""
    first = begun.open_sink(resume=True)
    with pytest.raises(ResumeError, match="is being written by another process"):
        begun.open_sink(resume=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = begun.open_sink(resume=True)
    box = next(first.missing())
    pixels = np.zeros((3, *box.shape), np.uint8)
    with pytest.raises(ResumeError, match="taken over by another process"):
        first.write(box, pixels)
    with pytest.raises(ResumeError, match="another process"):
        first.note({"late": True})
    begun.render(second)
    with pytest.raises(ResumeError, match="taken over"):
        first.finish()
    assert stored(out) == contents(material / "a.zarr")


def test_only_stores_of_the_engine_are_replaced(begun, out, material, call, server):
    """A shard of the old store that arrives late is in neither run of the new one, whether it is met or resumed."""
    line = f"render {material}/model.safetensors {TILES} --seed 3 --out {out} -q"
    place, old = objects.as_place(out), dict(stored(out))
    (place / "notes.txt").write_new(b"mine")
    code, _, error = call(f"{line} --overwrite")
    assert (code, "holds notes.txt, which no render wrote" in error) == (4, True)
    (place / "notes.txt").delete()
    shard = next(name for name in old if "/c/" in name)
    mark = (place / shard).head()["attributes"]
    request = Request(size=(768, 512), tile=64, executor="tiles", overlap="4", precision="fp32", seed=3)
    job = Job.prepare(material / "model.safetensors", request, out)
    sink = job.open_sink(overwrite=True)
    assert not any("/c/" in name for name in stored(out))
    assert (place / shard).write_new(old[shard], mark)
    job.render(sink)
    new = stored(out)
    assert new[shard] != old[shard]
    sink = job.open_sink(overwrite=True)
    assert (place / shard).write_new(old[shard], mark)
    sink.close()
    assert call(f"{line} --resume")[::2][0] == 0
    assert stored(out) == new


def test_a_damaged_store_is_repaired(out, material, call):
    upload(material / "bad.zarr", out)
    assert call(f"check {out} --repair -q")[0] == 0
    assert not stored_provenance(objects.as_place(out))["complete"]
    assert call(f"render {material}/model.safetensors {TILES} --out {out} --resume -q")[0] == 0
    assert stored(out) == contents(material / "a.zarr")


def test_a_render_says_how_it_goes_on_after_a_lasting_fault(begun, proxy, out, material, call):
    proxy.choose = lambda seen, total: "lost" if total >= 8 else None
    line = f"render {material}/model.safetensors {TILES} --out {out} --resume -q"
    code, _, error = call(line)
    assert (code, error.count("\n")) == (1, 1), error
    assert "check the network and" in error
    proxy.choose = lambda seen, total: None
    assert SECRET not in repr((error, stored(out)))
    assert call(line)[0] == 0
    assert SECRET not in repr((error, stored(out)))
    assert stored(out) == contents(material / "a.zarr")
