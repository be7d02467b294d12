"""Single-file OME-Zarr, read back by zarr, tensorstore and ome-zarr-models."""

import json
import zipfile

import numpy as np
import pytest
import tensorstore
import zarr
from ome_zarr_models.v05 import Image
from zarr.storage import ZipStore

from engine.errors import InputError, UsageError
from engine.exporters import export

AXES = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]


@pytest.fixture
def store(tmp_path, levels, write_store):
    """With the metadata that the models demand."""
    path = write_store(tmp_path / "out.zarr", levels)
    group = zarr.open_group(path)
    scales = [[{"type": "scale", "scale": [1.0, 2.0**i, 2.0**i]}] for i in range(len(levels))]
    datasets = [{"path": str(i), "coordinateTransformations": scale} for i, scale in enumerate(scales)]
    for index in range(len(levels)):
        metadata = path / str(index) / "zarr.json"
        described = json.loads(metadata.read_text()) | {"dimension_names": ["c", "y", "x"]}
        metadata.write_text(json.dumps(described))
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": AXES, "datasets": datasets}]}
    return path


def test_readers(store, levels, tmp_path):
    out = export(store, tmp_path / "a.ozx").path
    with ZipStore(out, mode="r") as opened:
        group = zarr.open_group(opened, mode="r")
        Image.from_zarr(group)
        for index, pixels in enumerate(levels):
            assert np.array_equal(group[str(index)][:], pixels.transpose(2, 0, 1))
    spec = {"driver": "zarr3", "kvstore": {"driver": "zip", "base": f"file://{out}", "path": "1/"}}
    assert np.array_equal(tensorstore.open(spec).result().read().result(), levels[1].transpose(2, 0, 1))


def test_order_comment_and_bytes(store, levels, tmp_path):
    out = export(store, tmp_path / "a.ozx").path
    with zipfile.ZipFile(out) as file:
        names = file.namelist()
        count = len(levels)
        assert names[: count + 1] == ["zarr.json", *(f"{index}/zarr.json" for index in range(count))]
        assert not [name for name in names[count + 1 :] if name.endswith("zarr.json")]
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        comment = {"version": "0.5", "zipFile": {"centralDirectory": {"jsonFirst": True}}}
        assert json.loads(file.comment) == {"ome": comment}
        for name in names[1:]:
            assert file.read(name) == (store / name).read_bytes()
    assert export(store, tmp_path / "b.ozx").path.read_bytes() == out.read_bytes()


def test_from_a_later_level(store, levels, tmp_path):
    out = export(store, tmp_path / "a.ozx", level=2)
    assert (out.width, out.levels) == (260, len(levels) - 2)
    with ZipStore(out.path, mode="r") as opened:
        group = zarr.open_group(opened, mode="r")
        Image.from_zarr(group)
        paths = [each["path"] for each in group.attrs["ome"]["multiscales"][0]["datasets"]]
        assert paths == ["2", "3", "4"] == sorted(group.array_keys())


def test_refusals(store, tmp_path, levels):
    with pytest.raises(UsageError, match="roi, size and depth: do not apply to .ozx"):
        export(store, tmp_path / "a.ozx", roi=(0, 0, 10, 10))
    with pytest.raises(UsageError, match="quality: does not apply to .ozx; it has no options"):
        export(store, tmp_path / "a.ozx", quality=10)
    old = zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2)
    old.create_array("0", shape=(3, 8, 8), dtype="uint8", chunks=(3, 8, 8))[:] = 1
    old.attrs["multiscales"] = [{"axes": AXES, "datasets": [{"path": "0"}]}]
    with pytest.raises(InputError, match="an OME-Zarr of Zarr 2; .ozx holds OME-Zarr 0.5"):
        export(tmp_path / "old.zarr", tmp_path / "a.ozx")
