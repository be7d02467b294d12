"""Image files, stores and folders, read as rows."""

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from engine.errors import InputError
from engine.geometry import Box
from engine.metrics.images import bands, expand, layout_size, open_image


@pytest.fixture
def pixels(picture):
    """uint8 [3, 201, 157]: the last band and the last chunks are cut."""
    return (picture(201, 157) * 255).byte().numpy()


def write_store(path, pixels, plan=None, complete=True, chunk=48):
    group = zarr.open_group(path, mode="w", zarr_format=3)
    shape = pixels.shape
    array = group.create_array(
        "0", shape=shape, dtype=pixels.dtype, chunks=(3, chunk, chunk), shards=(3, 2 * chunk, 2 * chunk)
    )
    array[:] = pixels
    axes = [{"name": name} for name in ("c", "y", "x")]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    if plan is not None:
        group.attrs["ourgan"] = {"complete": complete, "plan": plan}
    return path


def whole(sample, rows=64):
    return torch.cat(list(bands(sample.source, rows)), 1)


def test_picture_and_store_read_equal(tmp_path, pixels):
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "a.png")
    write_store(tmp_path / "a.zarr", pixels)
    for name in ("a.png", "a.zarr"):
        sample = open_image(tmp_path / name)
        assert (sample.name, sample.size) == (name, (201, 157))
        for rows in (1, 50, 64, 1000):
            np.testing.assert_array_equal((whole(sample, rows) * 255).round().byte().numpy(), pixels)


def test_boxes_across_cells_of_a_store(tmp_path, picture):
    pixels = (picture(1300, 40) * 255).byte().numpy()  # two and a half rows of cells
    source = open_image(write_store(tmp_path / "a.zarr", pixels)).source
    for box in (Box(500, 3, 1290, 17), Box(0, 0, 1, 40), Box(1299, 39, 1300, 40), Box(100, 0, 200, 40)):
        rows, columns = box.slices
        np.testing.assert_array_equal((source.read(box) * 255).round().byte().numpy(), pixels[:, rows, columns])


def test_sixteen_bits_reach_one(tmp_path):
    pixels = np.full((3, 64, 64), 65535, np.uint16)
    assert whole(open_image(write_store(tmp_path / "a.zarr", pixels))).unique().tolist() == [1.0]


def test_layout_size(tmp_path, pixels):
    plan = {"canvas": [201, 157], "base": [51, 40]}
    assert layout_size(open_image(write_store(tmp_path / "a.zarr", pixels, plan))) == (51, 40)
    region = {"canvas": [999, 999], "base": [51, 40]}
    assert layout_size(open_image(write_store(tmp_path / "b.zarr", pixels, region))) == (328, 256)
    assert layout_size(open_image(write_store(tmp_path / "c.zarr", pixels))) == (328, 256)


def test_folders_expand_in_order(tmp_path, pixels):
    folder = tmp_path / "samples"
    folder.mkdir()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / "b.PNG")
    write_store(folder / "a.zarr", pixels)
    (folder / "notes.txt").write_text("no picture")
    assert [p.name for p in expand([folder, folder / "b.PNG"])] == ["a.zarr", "b.PNG", "b.PNG"]


def test_refusals(tmp_path, pixels):
    with pytest.raises(InputError, match="nothing.png: no such picture or store"):
        open_image(tmp_path / "nothing.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no picture"):
        expand([tmp_path / "empty"])
    store = write_store(tmp_path / "half.zarr", pixels, {"canvas": [201, 157]}, complete=False)
    with pytest.raises(InputError, match="not finished"):
        open_image(store)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        open_image(tmp_path / "text.png")
