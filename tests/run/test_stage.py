"""A stage's network in pieces: the tail in strips of rows, some images of a batch at a time, with the bits of the whole."""

import pytest
import torch

from engine import archs
from engine.archs.esrgan import RRDBNet
from engine.archs.swinir import SwinIR
from engine.run.stage import Stage, _chunks

CPU = torch.device("cpu")


def rrdb(scale):
    return RRDBNet(channels=64, blocks=1, growth=32, scale=scale)


def swinir(scale):
    return SwinIR(dim=48, depths=(2,), heads=(2,), hidden=48, features=32, scale=scale)


# Wide enough that PyTorch takes the same algorithm for a piece as for the whole: below 20,480 values and for a batch of
# one it has another.
NETWORKS = {
    "rrdb x4": lambda: rrdb(4),
    "rrdb x2": lambda: rrdb(2),
    "swinir x4": lambda: swinir(4),
    "swinir x2": lambda: swinir(2),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval().requires_grad_(False)


def in_pieces(stage, tiles, pieces):
    batch, channels, height, width = tiles.shape
    out = torch.full((batch, channels, height * stage.scale, width * stage.scale), float("nan"))
    stage.fill(out, tiles, pieces)
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_have_the_bits_of_the_whole(network, precision):
    stage = Stage(network, CPU, precision)
    tiles = torch.rand(3, 3, 40, 48).contiguous(memory_format=torch.channels_last)
    whole = torch.cat([stage.run(tiles[k : k + 1]) for k in range(3)])
    assert whole.std() > 0.01
    for pieces in (1, 2, 3, 7):
        assert torch.equal(in_pieces(stage, tiles, pieces), whole), pieces
    for pieces in (2, 5):
        assert torch.equal(in_pieces(stage, tiles[:1], pieces), whole[:1]), pieces
    assert torch.equal(stage.run(tiles[:1], tail_chunks=5), whole[:1])


@pytest.mark.parametrize("reach", [1, 2])
def test_a_strip_needs_what_the_tail_looks_at(network, monkeypatch, reach):
    """Of RRDBNet's tail 2.25 pixels; SwinIR has a convolution more."""
    stage = Stage(network, CPU, "fp32")
    tile = torch.rand(1, 3, 40, 48)
    whole = stage.run(tile)
    monkeypatch.setattr("engine.run.stage.TAIL_REACH", reach)
    is_enough = isinstance(network, RRDBNet) and reach == 2
    assert torch.allclose(in_pieces(stage, tile, 4), whole, atol=1e-6, rtol=0) == is_enough


@pytest.mark.parametrize("images", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_pieces_cover_a_batch_once_and_are_about_as_many_as_asked_for(images, rows, count):
    seen = torch.zeros(images, rows, dtype=torch.int)
    pieces = list(_chunks(images, rows, count))
    for part, strip in pieces:
        seen[part, strip] += 1
    assert (seen == 1).all()
    assert max(len(range(images)[a]) * len(range(rows)[b]) for a, b in pieces) <= max(rows, 2 * images * rows / count)


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
