"""Row graphs of code of others: bands are compared with the whole picture before they are believed."""

import pytest
import torch
from support.networks import Network
from torch import nn

from engine.archs.layers import conv3
from engine.bands.check import checked_graph
from engine.errors import UsageError


def shared_tensor(net, x):
    """A tensor by two names, of which a trace sees one change."""
    a = net.a(x)
    b = a.to(torch.float32)
    b[:, :2] = net.b(x).narrow(1, 0, 2)
    return net.c(a).sigmoid()


def branches(net, x):
    return net.a(x if x.sum() > 0 else -x).sigmoid()


def saturated(net, x):
    return (net.a(x) + 10).clamp(0, 1)


def whole_picture(net, x):
    """The size of the picture, as a number of the trace."""
    return net.a(x * (x.shape[2] / 100)).sigmoid()


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (shared_tensor, r"they differ from the whole picture by .* levels of 255"),
        (whole_picture, r"they differ from the whole picture by .* levels of 255"),
        (saturated, "a random picture leads to black and white alone, which .*"),
        (branches, "TraceError: .*"),
    ],
)
def test_what_a_trace_does_not_show_is_refused(forward, reason):
    network = Network(forward, a=conv3(3, 3), b=conv3(3, 3), c=conv3(3, 3)).requires_grad_(False).eval()
    with pytest.raises(UsageError, match=rf"cannot be streamed in bands \({reason}\); use executor='tiles'$"):
        checked_graph(network, 1, 3)


def test_a_network_that_is_streamed_exactly_is_accepted():
    network = nn.Sequential(conv3(3, 12), nn.PixelShuffle(2), nn.Sigmoid()).requires_grad_(False)
    assert checked_graph(network, 1, 3).scale == 2


def test_a_tensor_that_code_keeps_is_itself_after_a_trace():
    """DAT keeps its mean in the type of the picture. The trace then fails at a branch, and the network runs as before."""

    def forward(part, x):
        part.mean = part.mean.type_as(x)
        return branches(part, x - part.mean)

    part = Network(forward, a=conv3(3, 3)).requires_grad_(False).eval()
    part.mean = torch.zeros(1, 1, 1, 1)
    network, picture = nn.Sequential(part), torch.ones(1, 3, 8, 8)
    before = network(picture)
    with pytest.raises(UsageError, match="TraceError"):
        checked_graph(network, 1, 3)
    assert torch.equal(network(picture), before)
