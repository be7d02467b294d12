"""Stores that grow shard by shard, without a network."""

import numpy as np

from engine.io.first_look import FIRST_LOOK, encode_first_look
from engine.io.provenance import COMMAND
from engine.io.zarr_store import ZarrSink
from support.plans import plan_of

SIZE = (700, 1100)
"""(height, width)."""


def pixels_of(size=SIZE, seed=0):
    """Soft colours and grain, uint8 [3, h, w]."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    planes = np.stack([np.sin(x / 337 + seed), np.cos(y / 223), np.sin((x + y) / 451)]) * 100 + 128
    grain = np.random.default_rng(seed).normal(0, 6, planes.shape)
    return np.clip(planes + grain, 0, 255).astype(np.uint8)


def new_store(path, size=SIZE, pixels=None, **changes):
    """A store of shards of 256 without pixels, with a first look; returns (sink, pixels)."""
    plan = plan_of(size, cores=(16, 64), halos=(8, 4), shard=256, chunk=128, **changes)
    pixels = pixels_of(size) if pixels is None else pixels
    look = encode_first_look(np.ascontiguousarray(pixels[:, ::16, ::16].transpose(1, 2, 0)))
    notes = {"seam_error_levels": 0.0, "licences": ["CC0-1.0: test"], "model": "test.safetensors", "engine": "0.1.0"}
    command = ["engine", "render", "--size", f"{size[1]}x{size[0]}"]
    return ZarrSink.create(path, plan, {**notes, COMMAND: command, FIRST_LOOK: look}), pixels


def write(sink, pixels, count=None):
    """Write the first ``count`` missing boxes; all of them, and finish, without."""
    for number, box in enumerate(list(sink.missing())):
        if number == count:
            return
        sink.write(box, pixels[(slice(None), *box.slices)])
    if count is None:
        sink.finish()


def store_of(path, size=SIZE, **changes):
    """A finished store; returns its pixels, uint8 [3, h, w]."""
    sink, pixels = new_store(path, size, **changes)
    write(sink, pixels)
    return pixels
