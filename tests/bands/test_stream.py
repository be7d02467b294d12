"""Row streams against the whole image: every architecture, any first row, in the planned memory."""

import random

import pytest
import torch
from support.networks import NETWORKS, Network, lively, per_token, rrdb, span, swinir
from support.streams import bands, noise_channels, plan, pour, pour_rows, stream, whole
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.archs.layers import conv3
from engine.bands.graph import read_graph
from engine.bands.stream import RowStream, StreamPlan

EXACT = 2e-6
"""Tolerance relative to the range of the output: float32 sums in another order."""


def assert_equal(streamed, expected, message=None):
    """Equal within ``EXACT`` of the expected image's range."""
    assert streamed.shape == expected.shape, message
    low, high = expected.aminmax()
    assert float((streamed - expected).abs().max()) <= EXACT * float(high - low), message


SHAPES = {
    "one": (1, 1, 1, None),
    "shorter than a band": (3, 5, 8, None),
    "shorter than the delay": (5, 3, 2, 1),
    "smallest bands": (13, 6, 1, None),
    "odd": (23, 7, 4, 2),
    "whole bands": (24, 5, 8, 8),
    "a row more than whole bands": (33, 4, 15, 5),
}
"""Height, width, band and tail band, in units of the network's ``align``."""


def check_all_shapes(network, picture):
    align = getattr(network, "align", 1)
    for name, (height, width, band, tail_band) in SHAPES.items():
        image = picture(height * align, width * align)
        image = torch.cat([image, torch.randn(noise_channels(network), *image.shape[1:])])
        rows = stream(network, band * align, width * align, tail_band and tail_band * align)
        assert_equal(pour(rows, image), whole(network, image), name)


@pytest.mark.parametrize("scale", [4, 2, 1])
def test_rrdb_equals_whole_image(picture, scale):
    check_all_shapes(rrdb(scale), picture)


@pytest.mark.parametrize(("window", "scale"), [(4, 4), (4, 2), (8, 4), (5, 4), (7, 2)])
def test_swinir_equals_whole_image(picture, window, scale):
    check_all_shapes(swinir(window, scale), picture)


@pytest.mark.parametrize("make", [rrdb, swinir])
def test_noise_channels_equal_whole_image(picture, make):
    check_all_shapes(make(noise_channels=5), picture)


@pytest.mark.parametrize("scale", [4, 3, 1])
def test_span_equals_whole_image(picture, scale):
    check_all_shapes(span(scale), picture)


@pytest.mark.parametrize("make", NETWORKS)
def test_any_network_equals_whole_image(picture, make):
    check_all_shapes(lively(make(), 0.3), picture)


@pytest.mark.parametrize("make", [rrdb, lambda: rrdb(2), swinir, *NETWORKS])
def test_column_blocks_equal_whole_image(picture, make):
    """Odd blocks, blocks narrower than a kernel, a smaller last block, both sides of the picture."""
    network = lively(make())
    image = picture(12, 36)
    expected = whole(network, image)
    for block in (1, 5, 8, 11, 29):
        rows = stream(network, 4, 36, 2, block)
        assert_equal(pour(rows, image), expected, block)
        assert any(len(s.column_blocks(op)) > 1 for s in rows.plan.segments for op in s.graph.ops)


def test_column_blocks_read_equally_many_columns():
    (segment,) = plan(lively(nn.Sequential(conv3(3, 3))), 4, 23, block=8).segments
    blocks = [(b.first, b.last, b.read_first, b.read_last) for b in segment.column_blocks(segment.graph.ops[0])]
    assert blocks == [(0, 8, 0, 10), (8, 16, 7, 17), (16, 23, 13, 23)]


def test_temporaries_of_blocks_do_not_grow_with_the_width():
    graph = read_graph(rrdb(), 1)
    wide, wider = (StreamPlan(graph, 8, width, 2, 64) for width in (1024, 2048))
    assert [s.temporary_bytes for s in wide.segments] == [s.temporary_bytes for s in wider.segments]
    unbounded = StreamPlan(graph, 8, 2048, 2)
    assert max(s.temporary_bytes for s in wider.segments) < max(s.temporary_bytes for s in unbounded.segments) / 16


def eight_bits(picture):
    return (picture.clamp(0, 1) * 255).round().int()


@pytest.mark.parametrize("name", ["small_rrdb", "small_swinir"])
def test_eight_bit_image_is_the_same(picture, request, name):
    network = request.getfixturevalue(name)
    image = picture(56, 40)
    expected = eight_bits(whole(network, image))
    assert expected.float().std() > 10
    difference = (eight_bits(pour(stream(network, 16, 40, 8), image)) - expected).abs()
    # Sums in another order may move a value that lies between two levels to the other one.
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) <= 1e-4


@pytest.mark.parametrize("name", ["small_rrdb", "small_swinir"])
def test_mixed_precision_is_within_one_level(picture, request, name):
    network = request.getfixturevalue(name)
    image = picture(56, 40)
    exact = whole(network, image)
    expected = whole(network.to_mixed(torch.bfloat16), image)
    assert not torch.equal(expected, exact)
    streamed = pour(stream(network, 16, 40, 8), image)
    assert streamed.dtype == torch.float32
    difference = (eight_bits(streamed) - eight_bits(expected)).abs()
    assert int(difference.max()) <= 1


@pytest.mark.parametrize("make", [rrdb, swinir])
def test_rows_beyond_the_radius_are_independent_of_the_start(picture, make):
    network = make()
    image = picture(104, 12)
    expected = whole(network, image)
    rows = stream(network, 8, 12, 2)
    from_the_top = pour(rows, image)
    for low in random.Random(0).sample(range(8, 104 - network.radius, 8), 3):
        streamed = pour(rows, image, low)
        reached = network.radius * network.scale
        assert_equal(streamed[:, reached:], expected[:, low * network.scale + reached :])
        # Bands of one shape on one grid give the same bits, so a resumed render writes the same file.
        assert torch.equal(streamed[:, reached:], from_the_top[:, low * network.scale + reached :])
        assert not torch.allclose(streamed[:, 0], expected[:, low * network.scale])


@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_a_stream_from_the_middle_sees_the_rows_below_only(picture, make):
    network, image = lively(make()), picture(64, 12)
    assert_equal(pour(stream(network, 8, 12), image, 24), whole(network, image[:, 24:]))


@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_some_rows_follow_from_those_that_are_read(picture, make):
    """Bit for bit, at the picture's ends and within; no other row is read, so none of its NaN is left."""
    network = lively(make())
    align = getattr(network, "align", 1)
    image = picture(10 * align + 30 // align * align, 12)
    rows = stream(network, 4 * align, 12, 2 * align)
    expected = pour(rows, image)
    end = expected.shape[1]
    for first, last in ((0, 1), (end // 2, end // 2 + 1), (end // 3, end - 5), (end - 1, end)):
        assert torch.equal(pour_rows(rows, image, first, last), expected[:, first:last]), (first, last)


@pytest.fixture
def poisoned(monkeypatch):
    """A plan -> (a stream whose memory holds NaN throughout, its arena)."""
    empty = torch.empty

    def make(plan):
        tensors = []

        def poison(*args, **options):
            tensors.append(empty(*args, **options).fill_(255))  # NaN in every format
            return tensors[-1]

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poison)
            rows = RowStream(plan)
        arena = tensors[0]
        assert arena.numel() == max(s.arena_bytes for s in plan.segments) > 0
        return rows, arena

    return make


@pytest.mark.parametrize("make", [rrdb, swinir, lambda: rrdb(2).to_inference(torch.bfloat16), *NETWORKS])
def test_no_row_is_read_before_it_is_written(picture, poisoned, make):
    """The arena's content between two bands does not matter."""
    network = lively(make())
    image = picture(44, 12)
    planned = plan(network, 4, 12)
    expected = pour(RowStream(planned), image)
    rows, arena = poisoned(planned)
    assert torch.equal(pour(rows, image, before_push=lambda: arena.fill_(255)), expected)


@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_start_removes_the_last_picture(picture, make):
    network = lively(make())
    image = picture(28, 12)
    rows = stream(network, 4, 12)
    expected = pour(rows, image)
    rows.start(0, 1000)
    for _, band in zip(range(9), bands(torch.full((3, 1000, 12), torch.nan), 4), strict=False):
        assert all(part.isnan().any() for _, part in rows.push(band))
    assert torch.equal(pour(rows, image), expected)


@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_rows_are_complete_exactly_after_the_delay(make):
    network = lively(make())
    for tail_band in (None, 2):
        planned = plan(network, 4, 8, tail_band)
        rows = RowStream(planned)
        rows.start(0, 400)
        complete, gaps = 0, []
        for pushed, band in zip(range(4, 120, 4), bands(torch.zeros(3, 400, 8), 4), strict=False):
            complete += sum(len(part) for _, part in rows.push(band))
            gaps.append(pushed - complete / planned.scale)
        assert planned.delay - 1 < max(gaps) <= planned.delay


def executed(rows, height):
    """Multiply-adds executed for a picture of ``height`` rows."""
    before = rows.macs
    pour(rows, torch.zeros(3, height, rows.plan.width))
    return rows.macs - before


def test_macs_of_two_convolutions_by_hand():
    """7 rows of 5 pixels in bands of 4.

    New rows of the first convolution begin at -1, 3 (and 7, outside); those of the second at -2, 2 and 6.
    """
    network = lively(nn.Sequential(conv3(3, 4), conv3(4, 2)))
    rows = stream(network, 4, 5)
    first, second = 3 * 4 * 9, 4 * 2 * 9
    assert rows.plan.macs(7) == 5 * 7 * (first + second)
    assert executed(rows, 7) == 5 * (8 * first + 12 * second)


def test_macs_of_some_rows_by_hand():
    """Rows [21, 30) read the rows [20, 31) of the first convolution, and [19, 32) of the picture.

    New rows of the first convolution begin at 19, 23 and 27, those of the second at 18, 22 and 26: whole bands of 4 rows.
    """
    rows = stream(lively(nn.Sequential(conv3(3, 4), conv3(4, 2))), 4, 5)
    assert rows.plan.rows_read((21, 30), 400) == (19, 32)
    pour_rows(rows, torch.zeros(3, 400, 5), 21, 30)
    assert rows.macs == 5 * (12 * 3 * 4 * 9 + 12 * 4 * 2 * 9)
    assert rows.plan.context == (1 * 3 * 4 * 9) / (3 * 4 * 9 + 4 * 2 * 9)


def test_macs_of_all_layers_by_hand():
    network = lively(per_token())
    pixel = 3 * 8 * 9 + 8 * 49 + 2 * 8 * 12 + 8 * 3 * 9  # grouped: each of 8 channels has a kernel of 7 x 7
    assert plan(network, 4, 6).macs(10) == 10 * 6 * pixel
    up = Network(lambda net, x: net.b(F.pixel_shuffle(net.a(x), 2)), a=conv3(3, 12), b=conv3(3, 3))
    assert plan(lively(up), 4, 6, 2).macs(10) == 10 * 6 * (3 * 12 * 9 + 4 * 3 * 3 * 9)


@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_every_inner_row_is_computed_once(make):
    """Only an operation's first and last band extend over the border, by less than a band each: there is no halo."""
    rows = stream(lively(make()), 8, 8)
    for height in (8, 40, 400):
        assert rows.plan.macs(height) <= executed(rows, height) < rows.plan.macs(height + 2 * 8)


def test_saved_rows_by_hand():
    """``wide`` reads x and ``a`` at delay 3 with 2 rows around; ``b`` and ``narrow``, which is added to it, wait for it."""

    def forward(net, x):
        a = net.a(x)
        b = net.b(a)
        return net.wide(torch.cat([x, a], 1)) + net.narrow(torch.cat([x, a, b], 1))

    wide = nn.Conv2d(7, 3, 5, padding=2)
    network = Network(forward, a=conv3(3, 4), b=nn.Conv2d(4, 2, 1), wide=wide, narrow=nn.Conv2d(9, 3, 1))
    (segment,) = plan(lively(network), 8, 6).segments
    saved = [{slot.value: slot.keep for slot in buffer.slots} for buffer in segment.buffers if buffer.saved_bytes]
    assert saved == [{"x": 5, "a": 4, "b": 0}, {"x": 2}, {"a": 2}]
    assert segment.state_bytes == 4 * 6 * (5 * 3 + 4 * 4 + 2 * 3 + 2 * 4)


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that were created inside and are alive; ``peak``: their maximum."""

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs or {})
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in inputs:
                self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


def peak_of(network, height, width, tail_band=None):
    """(planned, measured) bytes of streaming a picture."""
    band = torch.rand(1, 3, 8, width)
    planned = plan(network, 8, width, tail_band)
    with LiveBytes() as live:
        rows = RowStream(planned)
        rows.start(0, height)
        for _ in range((height + planned.delay) // 8 + 1):
            for _, part in rows.push(band):
                del part
    return planned.nbytes, live.peak


# The plan adds the largest temporaries to the largest arena; few networks have both at once.
@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_memory_is_planned_and_independent_of_the_height(make):
    network = lively(make())
    planned, measured = peak_of(network, 48, 24)
    assert 0.5 * planned < measured <= planned
    assert peak_of(network, 48, 8) == peak_of(network, 160, 8)


def test_tail_bands_divide_the_band():
    with pytest.raises(ValueError, match="tail band: 3 rows do not divide the band of 4"):
        plan(rrdb(), 4, 8, tail_band=3)


def test_memory_with_narrow_tail_bands():
    planned, measured = peak_of(rrdb(), 48, 24, tail_band=2)
    assert 0.7 * planned < measured <= planned
    assert planned < 0.6 * plan(rrdb(), 8, 24).nbytes


@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_memory_grows_with_the_width(make):
    network = lively(make())
    graph = read_graph(network, getattr(network, "align", 1))
    # 16 columns of one float fill a buffer's alignment, so that nothing is rounded up.
    for tail_band in (None, 2):
        assert StreamPlan(graph, 8, 5 * 64, tail_band).nbytes == 5 * StreamPlan(graph, 8, 64, tail_band).nbytes
    assert StreamPlan(graph, 8, 64).nbytes < StreamPlan(graph, 16, 64).nbytes


def test_no_rows_before_the_delay_or_after_the_last(picture):
    rows = stream(rrdb(), 4, 8)
    rows.start(0, 30)
    counts = [
        sum(len(part) for _, part in rows.push(band))
        for _, band in zip(range(24), bands(picture(30, 8), 4), strict=False)
    ]
    assert counts[:4] == [0] * 4  # 16 rows pushed; the delay is more than 18
    assert sum(counts[:13]) == sum(counts) == 120
