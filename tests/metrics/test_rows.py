"""Row by row is the whole picture: for every step, size and phase, in bounded memory."""

import pytest
import torch
from torch import nn

from engine.errors import InputError
from engine.metrics.rows import StridedNetwork, StridedRowStream, Window


def streamed(network, picture, step):
    """Every output of the network, from ``step`` rows at a time."""
    stream = StridedRowStream(StridedNetwork(network), tuple(picture.shape[2:]))
    outputs = None
    for y in range(0, picture.shape[2], step):
        made = stream.push(picture[:, :, y : y + step])
        outputs = outputs or [[] for _ in made]
        for parts, rows in zip(outputs, made, strict=True):
            if rows is not None:
                parts.append(rows)
    return [torch.cat(parts, 2) for parts in outputs]


def random_picture(height, width):
    return torch.rand(1, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


# Heights of all phases modulo 16, the last of Inception's strides.
@pytest.mark.parametrize(("height", "width", "step"), [(112 + k, 85 + k % 3, 5 + 4 * k) for k in range(16)])
def test_rows_of_inception_are_the_whole_picture(inception_network, height, width, step):
    picture = random_picture(height, width)
    whole = inception_network(picture)
    rows = streamed(inception_network, picture, step)
    assert [r.shape for r in rows] == [w.shape for w in whole]
    for got, wanted in zip(rows, whole, strict=True):
        assert wanted.std() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize(("height", "width", "step"), [(64, 64, 1), (95, 67, 16), (130, 71, 64), (66, 81, 100)])
def test_rows_of_alexnet_are_the_whole_picture(alex_network, height, width, step):
    picture = random_picture(height, width)
    whole = alex_network(picture)
    for got, wanted in zip(streamed(alex_network, picture, step), whole, strict=True):
        assert wanted.std() > 1e-4
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_strips_without_what_lies_around_them_differ(inception_network):
    """The test above can fail: the features of strips that know nothing of each other are others."""
    picture = random_picture(160, 85)
    whole = inception_network(picture)[0]
    alone = torch.cat([inception_network(part)[0] for part in picture.split(80, 2)], 2)
    height = min(whole.shape[2], alone.shape[2])
    assert (whole[:, :, :height] - alone[:, :, :height]).abs().max() > 1e-2


class Averages(nn.Module):
    """What the two networks have of pooling and padding, alone."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return (self.pool(x),)


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2), nn.Conv2d(3, 2, (7, 1), padding=(3, 0))]
)
@pytest.mark.parametrize("step", [1, 3, 8])
def test_rows_of_one_operation(pool, step):
    network = Averages(pool.double()).eval().requires_grad_(False)
    picture = random_picture(11, 9)
    torch.testing.assert_close(streamed(network, picture, step)[0], network(picture)[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.MaxPool2d(3, 2, padding=1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(3, 3, 3, dilation=2),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
    ],
)
def test_what_rows_would_get_wrong_is_refused(layer):
    with pytest.raises(TypeError, match="pool"):
        StridedNetwork(Averages(layer).eval())


def test_batch_norm_in_training_is_refused(inception_network):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return (self.norm(x),)

    with pytest.raises(TypeError, match="norm"):
        StridedNetwork(Norm())


def test_memory_does_not_grow_with_the_height(inception_network):
    network = StridedNetwork(inception_network)
    held = {}
    for height in (1024, 2048):  # both more than the 13th layer sees, so that every layer has all that it ever holds
        stream = StridedRowStream(network, (height, 80))
        held[height] = 0
        for _ in range(0, height, 32):
            stream.push(torch.zeros(1, 3, 32, 80, dtype=torch.float64))
            held[height] = max(held[height], stream.nbytes)
    assert held[2048] == held[1024] > 0


def test_sizes_are_those_of_the_paper(inception_network):
    """4096 x 2160: 546,720 vectors of the 5th layer and 33,782 of the 13th."""
    network = StridedNetwork(inception_network)
    fifth, thirteenth = (network.sizes(2160, 4096)[name] for name in network.outputs)
    assert fifth == (536, 1020)
    assert thirteenth == (133, 254)


def test_a_picture_that_is_too_small_is_refused(inception_network):
    network = StridedNetwork(inception_network)
    least = next(n for n in range(20, 200) if _fits(network, n))
    assert inception_network(random_picture(least, least))[1].shape[2:] == (1, 1)
    with pytest.raises(InputError, match=f"{least - 1}x{least} is too small for InceptionPrefix"):
        StridedRowStream(network, (least, least - 1))


def _fits(network, side):
    try:
        return bool(network.sizes(side, side))
    except InputError:
        return False


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 1])
def test_windows_by_enumeration(kernel, stride, padding):
    window = Window(kernel, stride, min(padding, kernel // 2))
    length = 13
    reads = []
    first = -window.padding
    while first + kernel <= length + window.padding:
        reads.append(range(first, first + kernel))
        first += stride
    assert window.outputs(length) == len(reads)
    for seen in range(length + 1):
        ready = [r for r in reads if all(i < seen for i in r if i < length)] if seen < length else reads
        # A window that reaches into the padding below waits for the last row, which tells that nothing follows.
        ready = [r for r in ready if seen == length or r[-1] < seen]
        assert window.complete(seen, length) == len(ready)
    for index, read in enumerate(reads):
        assert window.reads(index, index + 1) == (read.start, read.stop)
