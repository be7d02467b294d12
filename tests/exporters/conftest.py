"""Synthetic OME-Zarr stores, small enough to be held whole beside their export."""

from pathlib import Path

import numpy as np
import pytest
import zarr

PROVENANCE = {"complete": True, "seed": 7, "plan": {"model_digest": "sha256:0123"}, "licences": ["CC0-1.0"]}


def picture(height, width, dtype="uint8", seed=0):
    """[H, W, 3]: a smooth picture with some noise, so that every codec has something to do and nothing is constant."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = [np.sin(x / 37), np.cos(y / 23), np.sin((x + y) / 51)]
    top = np.iinfo(dtype).max
    noise = np.random.default_rng(seed).normal(0, 0.01, (height, width, 3))
    return np.clip((np.stack(planes, -1) * 0.4 + 0.5 + noise) * top, 0, top).astype(dtype)


def halve(pixels):
    """The next level: every second pixel, so ceil(size / 2)."""
    return np.ascontiguousarray(pixels[::2, ::2])


def make_levels(pixels, smallest=64):
    levels = [pixels]
    while max(levels[-1].shape[:2]) > smallest:
        levels.append(halve(levels[-1]))
    return levels


def write_store(path, levels, *, shard=256, chunk=128, ourgan=PROVENANCE, axes="cyx"):
    """Write ``levels`` ([H, W, 3] each) as a sharded OME-Zarr 0.5 image; ``ourgan`` None makes it somebody else's."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for index, pixels in enumerate(levels):
        planes = pixels.transpose(2, 0, 1)
        channels = planes.shape[0]
        array = group.create_array(
            str(index),
            shape=planes.shape,
            dtype=planes.dtype,
            chunks=(channels, chunk, chunk),
            shards=None if shard is None else (channels, shard, shard),
            dimension_names=list(axes),
            compressors=[zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")],
        )
        array[:] = planes
    datasets = [{"path": str(index)} for index in range(len(levels))]
    image = {"axes": [{"name": name} for name in axes], "datasets": datasets}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    if ourgan is not None:
        group.attrs["ourgan"] = ourgan
    return Path(path)


@pytest.fixture
def levels():
    """Odd sizes on purpose: the last tile of every level is cut, on both sides."""
    return make_levels(picture(531, 1037))


@pytest.fixture
def store(tmp_path, levels):
    return write_store(tmp_path / "out.zarr", levels)


@pytest.fixture
def break_reads(monkeypatch):
    """Make the third read of the pyramid fail, as a damaged shard would."""
    from engine.errors import InputError
    from engine.exporters.pyramid import Pyramid

    count = 0
    decode = Pyramid._decode

    def failing(self, level, cell):
        nonlocal count
        count += 1
        if count == 3:
            raise InputError("injected")
        return decode(self, level, cell)

    monkeypatch.setattr(Pyramid, "_decode", failing)
