"""Bands on a CPU: packed convolutions, planes of dense blocks, and links that threads compute at the same time."""

from fractions import Fraction

import pytest
import torch
from support.networks import NETWORKS, lively, rrdb, span, swinir
from support.streams import bands, pour, whole
from torch import nn
from torch.nn import functional as F

from engine.archs import to_mixed
from engine.archs.compact import Compact
from engine.archs.esrgan import RRDBNet
from engine.bands import segment
from engine.bands.cpu import is_supported
from engine.bands.graph import links, read_graph, split
from engine.bands.planes import PlanePlan
from engine.bands.rules import Rectify
from engine.bands.stream import RowStream, StreamPlan
from engine.bands.wavefront import Wavefront

pytestmark = pytest.mark.skipif(
    not is_supported(torch.nn.Conv2d(3, 3, 3)), reason="this build of PyTorch lacks oneDNN's operators"
)


def dense():
    """Wide enough for planes: two in its blocks' input, one in each of the four maps after it."""
    return lively(RRDBNet(channels=32, blocks=2, growth=16).eval())


def compact():
    return Compact(channels=16, convs=2, scale=2).eval()


def packed(network, band, width, workers=0, tail_band=None):
    graph = read_graph(network, getattr(network, "align", 1), packs=True)
    return RowStream(StreamPlan(graph, band, width, tail_band, workers=workers))


def planes(rows):
    return [b for segment in rows.plan.segments for b in segment.buffers if isinstance(b, PlanePlan)]


@pytest.mark.parametrize("make", [dense, rrdb, lambda: rrdb(2), swinir, *NETWORKS])
def test_packed_bands_equal_whole_image(picture, make):
    """Pictures lower than a band, of uneven heights, and started late; one thread and three."""
    network = lively(make())
    for height in (4, 20, 52):
        image = picture(height, 12)
        expected = whole(network, image)
        tolerance = 1e-5 * float(expected.abs().max())  # an amplifying network: rounding grows from layer to layer
        for band, workers in ((4, 0), (8, 0), (8, 3)):
            rows = packed(network, band, 12, workers, 4)
            difference = (pour(rows, image) - expected).abs().max()
            assert float(difference) <= tolerance, (height, band, workers)


@pytest.mark.parametrize("make", [dense, lambda: rrdb(2), compact, span])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_few_rows_at_a_time_have_the_bits_of_a_whole_band(picture, monkeypatch, make, precision):
    """Also at the picture's ends, and where a band's rows are no multiple of those."""
    network, image = lively(make()), picture(52, 12)
    if precision == "bf16":
        network = to_mixed(network, torch.bfloat16, kernels=False)
    expected = pour(packed(network, 8, 12, 0, 4), image)
    for size in (1, 12 * 16 * 4 * 3):
        monkeypatch.setattr(segment, "_RESULT_BYTES", size)
        rows = packed(network, 8, 12, 2, 4)
        for part in rows.plan.segments:
            for position, op in enumerate(part.graph.ops):
                assert part.rows_at_once(op) <= part.band * part.rate(position)
                assert op.rule.is_packed or part.rows_at_once(op) == part.band * part.rate(position)
        assert torch.equal(pour(rows, image), expected), size


def test_prelu_follows_a_convolution_without_memory_of_its_own():
    (trunk, *_) = split(read_graph(compact(), 1, packs=True))
    assert [type(op.rule.store) for op in trunk.ops if op.rule.is_packed][:3] == [Rectify] * 3
    plan = segment.SegmentPlan(trunk, 24, 1 << 15, None)
    assert [plan.rows_at_once(op) for op in trunk.ops if op.rule.is_packed] == [2, 2, 2, 2]
    assert {plan._temporary_bytes(op) for op in trunk.ops if isinstance(op.rule.store, Rectify)} == {
        2 * segment._RESULT_BYTES
    }


@pytest.mark.parametrize(
    ("make", "blocks_in_planes"),
    [
        (dense, 6),
        (lambda: dense().to_inference(torch.bfloat16), 0),  # 16 channels of bf16 are half a plane
        (lambda: lively(RRDBNet(channels=64, blocks=2, growth=32).eval()).to_inference(torch.bfloat16), 6),
    ],
)
def test_bits_depend_neither_on_threads_nor_on_bands(picture, make, blocks_in_planes):
    network, image = make(), picture(70, 24)
    one = packed(network, 8, 24)
    assert len(planes(one)) == blocks_in_planes
    expected = pour(one, image)
    for band, workers in ((8, 2), (8, 5), (24, 2)):
        rows = packed(network, band, 24, workers, 4)
        for _ in range(2):
            assert torch.equal(pour(rows, image), expected), (band, workers)


def test_bf16_blocks_lie_in_planes(picture):
    network = RRDBNet(channels=64, blocks=1, growth=32).eval().to_inference(torch.bfloat16)
    rows = packed(network, 8, 16, 2)
    assert [(p.unit, p.planes) for p in planes(rows)] == [(32, (2, 3, 4, 5, 6))] * 3
    blocks = [op for segment in rows.plan.segments for op in segment.graph.ops if op.inputs[0] == "cat_3"]
    assert [op.rule.adds_residual for op in blocks] == [True]
    slots = [s.value for segment in rows.plan.segments for b in segment.buffers for s in b.slots]
    assert slots.count(blocks[0].inputs[1]) == 1  # the residual is read in its planes
    image = picture(40, 16)
    assert float((pour(rows, image) - whole(network, image)).abs().max()) <= 0.002


class TwoWideValues(nn.Module):
    """A dense block of 32, 32 and 16 channels; an activation, which writes dense rows, yields the first ones."""

    def __init__(self):
        super().__init__()
        channels = ((3, 32), (32, 32), (64, 16), (80, 32), (32, 3))
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in channels)

    def forward(self, x):
        first, second, third, fourth, last = self.convs
        maps = start = F.gelu(first(x))
        for conv in (second, third):
            maps = torch.cat([maps, F.leaky_relu(conv(maps), 0.2)], 1)
        return last(torch.add(start, fourth(maps), alpha=0.3))


def test_a_dense_block_may_have_several_wide_values(picture):
    network, image = lively(TwoWideValues()), picture(52, 12)
    for band, workers in ((8, 0), (8, 2), (20, 0)):
        rows = packed(network, band, 12, workers)
        assert [(p.unit, p.planes) for p in planes(rows)] == [(16, (2, 4, 5))]
        staged = [op for part in rows.plan.segments for op in part.graph.ops if part.is_staged(op)]
        assert [op.rule.is_packed for op in staged] == [False]
        expected = whole(network, image)
        assert float((pour(rows, image) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_links_of_a_long_network():
    """One link for each residual group and one for both ends; the last one reads the network's input again."""
    graph = read_graph(RRDBNet(channels=8, blocks=6, growth=8), 1, packs=True)
    trunk, tail = split(graph)
    chain = links(trunk)
    assert sum((link.ops for link in chain), ()) == trunk.ops
    assert [link.input for link in chain[1:]] == [link.output for link in chain[:-1]]
    assert {link.skips for link in chain if link.skips} == {(graph.input,)}
    rows = StreamPlan(graph, 8, 12, 4, workers=2)
    last = max(index for index, skips in enumerate(rows.skips) if skips)
    (skip,) = rows.skips[last]
    assert (skip.source, skip.rows) == (-1, sum(s.delay for s in rows.segments[:last]))
    assert skip.rows == 1 + 6 * 15


def test_network_whose_largest_link_is_nearly_all_of_it_has_no_links():
    assert StreamPlan(read_graph(swinir(), swinir().align, packs=True), 16, 16, workers=2).workers == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_that_is_left_early_starts_again(picture, workers):
    network, image = dense(), picture(90, 12)
    rows = packed(network, 8, 12, workers, 4)
    expected = pour(rows, image)
    rows.start(0, 90)
    for _, band in zip(range(7), bands(image, 8), strict=False):
        for _ in rows.push(band):
            pass
    assert torch.equal(pour(rows, image), expected)
    assert torch.equal(pour(rows, image[:, 16:]), pour(packed(network, 8, 12, 0, 4), image[:, 16:]))


def test_error_of_a_link_is_raised_and_forgotten(picture, monkeypatch):
    network, image = dense(), picture(40, 12)
    rows = packed(network, 8, 12, 2)
    expected = pour(rows, image)
    with monkeypatch.context() as patch:
        patch.setattr(RowStream, "_tail", lambda *_: (_ for _ in ()).throw(RuntimeError("can't allocate memory")))
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            pour(rows, image)
    assert torch.equal(pour(rows, image), expected)


def test_wavefront_runs_links_and_bands_in_order():
    done = [[] for _ in range(5)]
    threads = set()

    def run(link, band):
        assert len(done[link]) == band
        assert link == 0 or len(done[link - 1]) > band
        threads.add(torch.get_num_threads())
        done[link].append(band)

    before = torch.get_num_threads()
    wavefront = Wavefront(5, run, 3)
    for _ in range(20):
        wavefront.submit()
    wavefront.wait(20)
    assert done == [list(range(20))] * 5
    assert threads == {max(1, before // 3)}
    assert torch.get_num_threads() == before


def test_upsampling_takes_four_ninths_of_the_products():
    packed_graph, plain = (read_graph(rrdb(), 1, packs=packs) for packs in (True, False))
    first, second = (op.rule.macs for op in packed_graph.ops if op.rule.factor == 2)
    saved = Fraction(5, 4) * (first * 2**2 + second * 4**2)
    assert plain.macs() - packed_graph.macs() == saved
