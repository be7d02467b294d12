"""What an open store gives beyond its pixels: thumbnails, lazy arrays, and a picture in notebooks."""

import base64
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image
from support.growing import new_store, store_of, write

import engine

SIZE = (300, 700)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    pixels = store_of(path, SIZE)
    return engine.open(path), pixels.transpose(1, 2, 0)


@pytest.mark.parametrize(
    "index",
    [
        np.s_[:], np.s_[10:20, 30:400], np.s_[5], np.s_[-1, -2], np.s_[::7, 600::-3], np.s_[..., 1], np.s_[2:4, ..., 0],
        np.s_[250:, :, 1:], np.s_[9:9], np.s_[10, 20, 2], np.s_[280:999, 690:999],
    ],
    ids=str,
)  # fmt: skip
def test_lazy_array_indexes_as_numpy(store, index):
    opened, pixels = store
    array = opened.multiscale()[0]
    assert array.shape == pixels.shape
    assert np.array_equal(array[index], pixels[index])


def test_lazy_array_refuses_what_lies_outside(store):
    with pytest.raises(IndexError):
        store[0].multiscale()[0][300]


def test_levels_are_napari_ready(store):
    opened, pixels = store
    levels = opened.multiscale()
    assert [level.shape for level in levels] == [(300, 700, 3), (150, 350, 3), (75, 175, 3), (38, 88, 3)]
    assert [np.asarray(level).dtype for level in levels] == [np.uint8] * 4
    assert np.array_equal(levels[0], pixels)


def test_dask_is_optional(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(engine.UsageError, match="dask is not installed"):
        store[0].multiscale(dask=True)
    monkeypatch.undo()
    pytest.importorskip("dask.array")
    arrays = store[0].multiscale(dask=True)
    assert arrays[0].chunks == ((128, 128, 44), (128,) * 5 + (60,), (3,))
    assert np.array_equal(arrays[0].compute(), store[1])


def test_notebook_shows_a_thumbnail_also_while_it_grows(tmp_path):
    sink, pixels = new_store(tmp_path / "a<b>.zarr", SIZE)
    write(sink, pixels, count=4)
    opened = engine.open(tmp_path / "a<b>.zarr")
    html = opened._repr_html_()
    assert "a&lt;b&gt;.zarr: 700 x 300 px, seed 1, not complete" in html
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]+)"', html)[1]))))
    assert shown.shape == (171, 400, 3)
    whole = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).resize((400, 171), Image.Resampling.BOX)).astype(int)
    assert np.abs(shown - whole).mean() < 8
    assert opened.thumbnail(100).shape == (43, 100, 3)
