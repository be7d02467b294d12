"""Small networks that can be streamed, with every kind of operation and of connection between values."""

import torch
from torch import nn
from torch.nn import functional as F

from engine.archs.compact import Compact
from engine.archs.esrgan import RRDBNet
from engine.archs.layers import conv3
from engine.archs.span import SPAN
from engine.archs.swinir import SwinIR


class Network(nn.Module):
    """A network from ``forward(network, x)`` and its layers by name."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._forward(self, x)


@torch.no_grad()
def lively(network, noise=0.1):
    """Randomise weights and statistics, so that every layer changes every pixel."""
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape) * noise)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return network.eval().requires_grad_(False)


def rrdb(scale=4, **options):
    """RRDBNet with two upsamplings: a scale below 4 folds pixels first."""
    return lively(RRDBNet(channels=8, blocks=1, growth=4, scale=scale, fold=4 // scale, **options))


def swinir(window=4, scale=4, **options):
    sizes = {"dim": 8, "depths": (3, 1), "heads": (2, 1), "hidden": 12, "features": 6}
    return lively(SwinIR(**sizes, window=window, scale=scale, **options), 0.2)


def compact(scale=4, **options):
    return lively(Compact(channels=8, convs=2, scale=scale, **options))


def span(scale=4):
    """SPAN that sees the image as it is: in levels of 255, random blocks, each of which squares, leave float32's accuracy."""
    return lively(SPAN(channels=8, scale=scale, normalised=False), 0.02)


def check_radius(network):
    """With positive weights nothing cancels, so the gradient's support is exactly what the graph connects."""
    network = network.double()
    for parameter in network.parameters():
        parameter.data = parameter.data.abs() + 0.1
    scale, align = network.scale, network.align
    half = -(-(network.radius + 8) // align) * align
    x = torch.rand(1, 3, align, 2 * half, dtype=torch.float64, requires_grad=True)
    y, reach = network(x), []
    for q in range(half * scale, (half + align) * scale):
        (grad,) = torch.autograd.grad(y[0, :, 0, q].sum(), x, retain_graph=True)
        # The masked neighbours of a cyclic roll of windows weigh exp(-100), which is not zero in fp64.
        support = (grad.abs().sum((0, 1, 2)) > 1e-30).nonzero().flatten()
        reach += [q // scale - int(support[0]), int(support[-1]) - q // scale]
    assert max(reach) == network.radius < half


def many_kernels():
    layers = [
        nn.Conv2d(3, 8, 5, padding=2),
        nn.Conv2d(8, 8, 3, padding=3, dilation=3),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.Conv2d(8, 8, (5, 1), padding=(2, 0)),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 2), dilation=(1, 2)),
        nn.Conv2d(8, 3, 5, padding="same", dilation=2),
    ]
    return nn.Sequential(*(layer for conv in layers for layer in (conv, nn.GELU())))


def bilinear():
    def forward(net, x):
        y = F.interpolate(net.first(x), scale_factor=2, mode="bilinear", align_corners=False)
        return net.last(net.up(net.middle(y)))

    up = nn.Upsample(scale_factor=3, mode="bilinear")
    return Network(forward, first=conv3(3, 6), middle=conv3(6, 6), up=up, last=conv3(6, 3))


def batch_norm():
    return nn.Sequential(conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv3(8, 8), nn.BatchNorm2d(8), conv3(8, 3))


def per_token():
    """ConvNeXt block: depthwise convolution, LayerNorm, an MLP per pixel and a learnt scale."""

    def forward(net, x):
        x = net.first(x)
        y = net.norm(net.wide(x).permute(0, 2, 3, 1))
        y = net.down(F.gelu(net.up(y))) * net.gamma
        return net.last(x + y.permute(0, 3, 1, 2))

    return Network(
        forward,
        first=conv3(3, 8),
        wide=nn.Conv2d(8, 8, 7, padding=3, groups=8),
        norm=nn.LayerNorm(8),
        up=nn.Linear(8, 12),
        down=nn.Linear(12, 8),
        gamma=nn.Parameter(torch.ones(8)),
        last=conv3(8, 3),
    )


def nested_concatenations():
    def forward(net, x):
        a = net.a(x)
        inner = torch.cat([x, a], 1)
        b = F.relu(net.b(inner))
        outer = torch.cat([inner, torch.cat([b, net.c(b)], 1)], dim=1)
        return net.last(F.silu(net.d(outer)))

    return Network(forward, a=conv3(3, 4), b=conv3(7, 5), c=nn.Conv2d(5, 3, 1), d=conv3(15, 6), last=conv3(6, 3))


def concatenations_in_other_orders():
    """No concatenation is a prefix of another, and one holds a value twice."""

    def forward(net, x):
        a, b = net.a(x), net.b(net.a(x))
        return net.c(torch.cat([a, b], 1)) + net.d(torch.cat([b, x, a], 1)) + net.e(torch.cat([b, a, b], 1))

    return Network(forward, a=conv3(3, 3), b=conv3(3, 3), c=conv3(6, 3), d=conv3(9, 3), e=nn.Conv2d(9, 3, 5, padding=2))


def concatenated_and_late():
    """A value is part of a concatenation and is read much later, alone and in another one."""

    def forward(net, x):
        a = net.a(x)
        b = net.b(torch.cat([a, x], 1))
        for _ in range(4):
            b = torch.tanh(net.c(b))
        return net.d(torch.cat([b, a], 1)) * a - x

    return Network(forward, a=conv3(3, 3), b=conv3(6, 3), c=conv3(3, 3), d=conv3(6, 3))


def in_place():
    def part(inputs, outputs):
        return nn.Sequential(conv3(inputs, outputs), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1, inplace=True))

    def forward(net, x):
        a = net.a(x)
        return net.d(F.relu(net.b(a) + a, inplace=True)) + net.c(a)

    return Network(forward, a=part(3, 6), b=part(6, 6), c=conv3(6, 3), d=conv3(6, 3))


def folded_within():
    """Pixel unshuffle and shuffle between convolutions, inside a skip connection; bands must be even."""

    def forward(net, x):
        x = net.a(x)
        return net.c(x + F.pixel_shuffle(net.b(F.pixel_unshuffle(x, 2)), 2))

    return Network(forward, align=2, a=conv3(3, 4), b=conv3(16, 16), c=conv3(4, 3))


def dense_tail():
    """Two enlargements; concatenations and a skip connection after the first."""

    def forward(net, x):
        x = net.first(x)
        y = net.up(F.relu(net.a(x) + x))
        z = torch.cat([y, F.leaky_relu(net.b(y), 0.3)], 1)
        return net.last(F.pixel_shuffle(net.c(z) + torch.cat([y, y], 1), 2))

    up = nn.Upsample(scale_factor=2)
    return Network(forward, first=conv3(3, 4), a=conv3(4, 4), up=up, b=conv3(4, 4), c=conv3(8, 8), last=conv3(2, 3))


def arithmetic():
    """Every operator, scalars on either side, and functions that are not zero at zero."""

    def forward(net, x):
        a = torch.sigmoid(net.a(1 - x)) + 0.5
        b = (2 * a).clamp(0.1, 2.5) / (a + 1)
        return net.b(torch.abs(b - a.neg()) * 3) / 2 + torch.add(a, b, alpha=0.5) - net.shift

    return Network(forward, a=conv3(3, 3), b=conv3(3, 3), shift=nn.Parameter(torch.rand(1, 3, 1, 1)))


def constants():
    """Constants on either side of a sum with a delayed value."""

    def forward(net, x):
        y = net.a(x + net.shift)
        return net.b(torch.add(net.wide, y, alpha=0.5))

    shift, wide = (nn.Parameter(torch.rand(1, n, 1, 1)) for n in (3, 4))
    return Network(forward, a=conv3(3, 4), b=conv3(4, 3), shift=shift, wide=wide)


def one_value_by_two_names():
    return Network(lambda net, x: net.b((y := net.a(x)) + y.to(torch.float32)), a=conv3(3, 4), b=conv3(4, 3))


NETWORKS = [
    compact, many_kernels, bilinear, batch_norm, per_token, nested_concatenations, concatenations_in_other_orders,
    concatenated_and_late, in_place, folded_within, dense_tail, arithmetic, constants, one_value_by_two_names,
]  # fmt: skip
