"""A stage's network in chunks: a tail in strips of rows, or in some images of a batch at a time, has the bits of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import archs
from engine.archs.compact import Compact
from engine.archs.esrgan import RRDBNet
from engine.archs.span import SPAN
from engine.archs.swinir import SwinIR
from engine.run.stage import Stage, _chunks

CPU = torch.device("cpu")


def rrdb(scale):
    return RRDBNet(channels=64, blocks=1, growth=32, scale=scale, fold=4 // scale)


def swinir(scale, **options):
    sizes = {"dim": 48, "depths": (2,), "heads": (2,), "hidden": 48, "features": 32}
    return SwinIR(**{**sizes, **options}, scale=scale)


# Wide enough for PyTorch to take the same algorithm for a chunk as for the whole: below 20,480 values, and for a batch of
# one, it takes another.
NETWORKS = {
    "rrdb x4": lambda: rrdb(4),
    "rrdb x2": lambda: rrdb(2),
    "swinir x4": lambda: swinir(4),
    "swinir x2": lambda: swinir(2),
    "swinir x4, shuffled": lambda: swinir(4, head="pixelshuffle", features=64),
    "swinir x1": lambda: swinir(1, head="none"),
    "compact x3": lambda: Compact(channels=48, convs=2, scale=3),
    "span x2": lambda: SPAN(channels=48, scale=2),
}


REACHES = {"rrdb x4": 2, "rrdb x2": 2, "swinir x1": 0, "compact x3": 0, "span x2": 0}
"""Pixels that tails reach, if not 3: RRDBNet's reaches 2.25, SwinIR's has one more convolution, others only shuffle."""


@pytest.fixture(params=NETWORKS)
def new_network(request):
    """Function that makes the network again, as a stage may cast it in place."""

    def make():
        torch.manual_seed(0)
        return NETWORKS[request.param]().eval().requires_grad_(False)

    return make


def in_chunks(stage, tiles, chunks):
    batch, channels, height, width = tiles.shape
    out = torch.full((batch, channels, height * stage.scale, width * stage.scale), float("nan"))
    stage.fill(out, tiles, chunks)
    return out


def test_chunks_have_the_bits_of_the_whole(new_network):
    for precision in ("fp32", "bf16"):
        stage = Stage(new_network(), CPU, precision)
        tiles = torch.rand(3, 3, 40, 48).contiguous(memory_format=torch.channels_last)
        whole = torch.cat([stage.run(tiles[k : k + 1]) for k in range(3)])
        assert whole.std() > 0.01
        for chunks in (1, 2, 3, 7):
            assert torch.equal(in_chunks(stage, tiles, chunks), whole), (precision, chunks)
        for chunks in (2, 5):
            assert torch.equal(in_chunks(stage, tiles[:1], chunks), whole[:1]), (precision, chunks)
        assert torch.equal(stage.run(tiles[:1], tail_chunks=5), whole[:1]), precision


def test_tail_reach_is_the_smallest_that_suffices(new_network, request, monkeypatch):
    stage = Stage(new_network(), CPU, "fp32")
    needed = REACHES.get(request.node.callspec.params["new_network"], 3)
    tile = torch.rand(1, 3, 40, 48)
    whole = stage.run(tile)
    for reach in (1, 2):
        monkeypatch.setattr("engine.run.stage.TAIL_REACH", reach)
        assert torch.allclose(in_chunks(stage, tile, 4), whole, atol=1e-6, rtol=0) == (reach >= needed), reach


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(1, 16), st.integers(1, 80), st.integers(1, 64))
def test_chunks_cover_a_batch_once(images, rows, count):
    """And are about as many as requested."""
    covered = torch.zeros(images, rows, dtype=torch.int)
    chunks = list(_chunks(images, rows, count))
    for part, strip in chunks:
        covered[part, strip] += 1
    assert (covered == 1).all()
    assert max(len(range(images)[a]) * len(range(rows)[b]) for a, b in chunks) <= max(rows, 2 * images * rows / count)


def test_a_stage_in_half_precision_knows_its_float32_form(small_rrdb, picture):
    full = archs.build(small_rrdb.state_dict())
    made = []
    stage = Stage(small_rrdb, CPU, "bf16", lambda: made.append(1) or full)
    tile = picture(24, 24)[None]
    assert made == []
    assert torch.equal(stage.fp32_fallback.run(tile), full(tile))
    assert not torch.equal(stage.fp32_fallback.run(tile), stage.run(tile))
    assert made == [1]
    assert stage.fp32_fallback.fp32_fallback is None
