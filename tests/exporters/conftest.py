"""Synthetic OME-Zarr stores, small enough to be held in memory.

Helpers are fixtures that return functions, because every folder may have a module named ``conftest``.
"""

from pathlib import Path

import numpy as np
import pytest
import zarr

from engine.errors import InputError

PROVENANCE = {"complete": True, "seed": 7, "plan": {"model_digest": "sha256:0123"}, "licences": ["CC0-1.0"]}


def _picture(height, width, dtype="uint8"):
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = np.stack([np.sin(x / 37), np.cos(y / 23), np.sin((x + y) / 51)], -1) * 0.4 + 0.5
    noise = np.random.default_rng(0).normal(0, 0.01, planes.shape)
    top = np.iinfo(dtype).max
    return np.clip((planes + noise) * top, 0, top).astype(dtype)


def _halvings(pixels, smallest=128):
    levels = [pixels]
    while max(levels[-1].shape[:2]) > smallest:
        levels.append(np.ascontiguousarray(levels[-1][::2, ::2]))
    return levels


def _write(path, levels, *, shard=256, chunk=128, ourgan=PROVENANCE, axes=("c", "y", "x"), names="{}"):
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for index, pixels in enumerate(levels):
        planes = pixels.transpose(2, 0, 1)
        channels = planes.shape[0]
        array = group.create_array(
            names.format(index),
            shape=planes.shape,
            dtype=planes.dtype,
            chunks=(channels, chunk, chunk),
            shards=None if shard is None else (channels, shard, shard),
            config={"write_empty_chunks": True},  # as the engine does: an absent shard was lost
            compressors=[zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")],
        )
        array[:] = planes
    datasets = [{"path": names.format(index)} for index in range(len(levels))]
    image = {"axes": [{"name": name} for name in axes], "datasets": datasets}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    if ourgan is not None:
        group.attrs["ourgan"] = ourgan
    return Path(path)


@pytest.fixture(scope="session")
def picture():
    """(height, width, dtype) -> [H, W, 3]: smooth with some noise, so that a displaced or lost pixel shows."""
    return _picture


@pytest.fixture(scope="session")
def halvings():
    """[H, W, 3] -> its levels, each with every second pixel of the one before: ceil(size / 2)."""
    return _halvings


@pytest.fixture(scope="session")
def write_store():
    """Write levels as a sharded OME-Zarr 0.5 image; ``ourgan=None`` for a store of other software."""
    return _write


@pytest.fixture(scope="session")
def levels():
    """Odd sizes: the last tile of every level is cut, on both sides."""
    return _halvings(_picture(531, 1037))


@pytest.fixture
def store(tmp_path, levels):
    return _write(tmp_path / "out.zarr", levels)


@pytest.fixture
def small_cells(monkeypatch):
    """Cells of one 128-pixel chunk, so that a small picture has many; each square of tiles is awaited."""
    from engine.exporters import pyramid, tiles

    monkeypatch.setattr(tiles, "_IN_FLIGHT", 0)
    monkeypatch.setattr(pyramid, "CELL_ROWS", 128)
    monkeypatch.setattr(pyramid, "CELL_BYTES", 1)


@pytest.fixture
def broken_reads(monkeypatch):
    """The second read of a pyramid fails, as on a damaged shard; later reads succeed."""
    from engine.exporters.pyramid import Pyramid

    decode = Pyramid._decode
    count = 0

    def failing(self, level, cell):
        nonlocal count
        count += 1
        if count == 2:
            raise InputError("injected")
        return decode(self, level, cell)

    monkeypatch.setattr(Pyramid, "_decode", failing)
