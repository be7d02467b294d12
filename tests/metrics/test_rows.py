"""Streaming equals the whole image for every step, size and phase, in bounded memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine.errors import InputError
from engine.metrics.rows import StridedNetwork, StridedRowStream, Window


def streamed(network, picture, step):
    """Every output of the network, streamed ``step`` rows at a time."""
    stream = StridedRowStream(StridedNetwork(network), tuple(picture.shape[2:]))
    outputs = None
    for y in range(0, picture.shape[2], step):
        strips = stream.push(picture[:, :, y : y + step])
        outputs = outputs or [[] for _ in strips]
        for parts, rows in zip(outputs, strips, strict=True):
            if rows is not None:
                parts.append(rows)
    return [torch.cat(parts, 2) for parts in outputs]


def random_picture(height, width):
    return torch.rand(1, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def check(network, height, width, step, least_std):
    picture = random_picture(height, width)
    whole = network(picture)
    rows = streamed(network, picture, step)
    assert [r.shape for r in rows] == [w.shape for w in whole]
    for actual, expected in zip(rows, whole, strict=True):
        assert expected.std() > least_std
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_inception_streams_exactly(inception_network):
    """Heights of all phases modulo 16, the product of Inception's strides."""
    for k in range(16):
        check(inception_network, 112 + k, 85 + k % 3, 5 + 4 * k, 1e-3)


def test_alexnet_streams_exactly(alex_network):
    for height, width, step in ((64, 64, 1), (95, 67, 16), (130, 71, 64), (66, 81, 100)):
        check(alex_network, height, width, step, 1e-4)


def test_separate_strips_differ(inception_network):
    """The tests above can fail: features of strips computed separately differ."""
    picture = random_picture(160, 85)
    whole = inception_network(picture)[0]
    alone = torch.cat([inception_network(part)[0] for part in picture.split(80, 2)], 2)
    height = min(whole.shape[2], alone.shape[2])
    assert (whole[:, :, :height] - alone[:, :, :height]).abs().max() > 1e-2


class One(nn.Module):
    """A network of one operation."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return (self.layer(x),)


def test_single_operations_stream_exactly():
    layers = (
        nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2), nn.Conv2d(3, 2, (7, 1), padding=(3, 0)),
    )  # fmt: skip
    for layer in layers:
        network = One(layer.double()).eval().requires_grad_(False)
        picture = random_picture(11, 9)
        for step in (1, 3, 8):
            rows = streamed(network, picture, step)[0]
            torch.testing.assert_close(rows, network(picture)[0], rtol=0, atol=1e-15)


def test_unsupported_operations_are_refused():
    layers = (
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.MaxPool2d(3, 2, padding=1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(3, 3, 3, dilation=2),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
    )
    for layer in layers:
        with pytest.raises(TypeError, match="layer"):
            StridedNetwork(One(layer).eval())
    with pytest.raises(TypeError, match="layer"):
        StridedNetwork(One(nn.BatchNorm2d(3)).train())


def test_memory_is_independent_of_height(inception_network):
    network = StridedNetwork(inception_network)
    peak = {}
    for height in (1024, 2048):  # both exceed the receptive field, so that every buffer reaches its largest size
        stream = StridedRowStream(network, (height, 80))
        peak[height] = 0
        for _ in range(0, height, 32):
            stream.push(torch.zeros(1, 3, 32, 80, dtype=torch.float64))
            peak[height] = max(peak[height], stream.nbytes)
    assert peak[2048] == peak[1024] > 0


def test_sizes_at_4k(inception_network):
    """4096x2160 has 546,720 vectors of the 5th layer and 33,782 of the 13th."""
    network = StridedNetwork(inception_network)
    fifth, thirteenth = (network.sizes(2160, 4096)[name] for name in network.outputs)
    assert fifth == (536, 1020)
    assert thirteenth == (133, 254)


def test_too_small_images_are_refused(inception_network):
    network = StridedNetwork(inception_network)
    smallest = next(n for n in range(20, 200) if _fits(network, n))
    assert inception_network(random_picture(smallest, smallest))[1].shape[2:] == (1, 1)
    with pytest.raises(InputError, match=f"{smallest - 1}x{smallest} is too small for InceptionPrefix"):
        StridedRowStream(network, (smallest, smallest - 1))


def _fits(network, side):
    try:
        return bool(network.sizes(side, side))
    except InputError:
        return False


@given(kernel=st.integers(1, 8), stride=st.integers(1, 5), padding=st.integers(0, 4), length=st.integers(8, 24))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_windows_by_enumeration(kernel, stride, padding, length):
    window = Window(kernel, stride, min(padding, kernel // 2))
    reads = []
    first = -window.padding
    while first + kernel <= length + window.padding:
        reads.append(range(first, first + kernel))
        first += stride
    assert window.outputs(length) == len(reads)
    for seen in range(length + 1):
        # A window that reaches into the lower padding waits for the last row, because only then nothing follows.
        complete = [r for r in reads if r[-1] < seen or seen == length]
        assert window.complete(seen, length) == len(complete)
    for index, read in enumerate(reads):
        assert window.reads(index, index + 1) == (read.start, read.stop)
