"""Row graphs of networks: rates, delays, the cut before the first enlargement, and operations that are refused."""

import re
from fractions import Fraction

import pytest
import torch
from support.networks import Network, compact, rrdb, span, swinir
from torch import nn
from torch.nn import functional as F

from engine.archs.esrgan import RRDBNet
from engine.archs.layers import conv3
from engine.archs.swinir import SwinIR, WindowAttention
from engine.bands.graph import radius, read_graph, schedule, split
from engine.bands.rules import Layout, Rows
from engine.errors import UsageError


def chain(**layers):
    def forward(net, x):
        for name in layers:
            x = getattr(net, name)(x)
        return x

    return Network(forward, **layers).eval()


def read(network, align=1):
    return read_graph(network.requires_grad_(False), align)


def on_tokens(layer):
    return Network(lambda net, x: net.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), layer=layer)


def windows(shift):
    return on_tokens(WindowAttention(4, 2, 4, shift))


def delays(network, align=1):
    """(read delay, output delay) of every operation in order."""
    graph = read(network, align)
    times = schedule(graph)
    return [(times.read[op.name], times.delay[op.name]) for op in graph.ops]


def test_rows_inside_and_outside():
    def where(top):
        rows = Rows(top, 4, 10, 20)
        return "outside" if rows.outside else "inside" if rows.inside else "border"

    tops = [(t, where(t)) for t in (6, 7, 9, 10, 16, 17, 19, 20)]
    assert [t for t, w in tops if w == "outside"] == [6, 20]
    assert [t for t, w in tops if w == "inside"] == [10, 16]
    assert Rows(8, 4, 0, 20).grow(3) == Rows(5, 10, 0, 20)
    assert Rows(-8, 4, 0, 20).scale(Fraction(1, 2)) == Rows(-4, 2, 0, 10)


def test_delays_of_convolutions():
    assert delays(chain(a=conv3(3, 4), b=conv3(4, 3))) == [(1, 1), (2, 2)]
    assert delays(chain(a=nn.Conv2d(3, 4, 5, padding=2), b=nn.ReLU(), c=nn.Conv2d(4, 3, 1))) == [(2, 2)] * 3
    assert delays(chain(a=nn.Conv2d(3, 3, 5, padding=(6, 2), dilation=(3, 1)))) == [(6, 6)]


def test_delays_behind_an_enlargement():
    enlarged = chain(a=conv3(3, 4), up=nn.Upsample(scale_factor=2), b=conv3(4, 12), shuffle=nn.PixelShuffle(2))
    assert delays(enlarged) == [(1, 1), (1, 2), (3, 3), (3, 6)]


def test_delays_of_bilinear_enlargement():
    assert delays(chain(up=nn.Upsample(scale_factor=3, mode="bilinear"), a=conv3(3, 3))) == [(1, 3), (4, 4)]


def test_delays_of_pixel_unshuffle():
    folded = chain(a=conv3(3, 3), fold=nn.PixelUnshuffle(4), b=conv3(48, 48), up=nn.PixelShuffle(4))
    assert delays(folded, align=4) == [(1, 1), (4, 1), (2, 2), (2, 8)]


def test_delays_of_window_attention():
    """Windows of 4: first at 0, 4, 8, then at 2, 6, 10."""
    network = chain(
        a=conv3(3, 4), plain=windows(0), shifted=windows(2), again=windows(2), flat=windows(0), b=conv3(4, 3)
    )
    assert delays(network, align=4) == [(1, 1), (4, 4), (6, 6), (6, 6), (8, 8), (9, 9)]


def test_delays_of_a_sum():
    """The part of the concatenation that is ready first is not computed before the other one."""
    network = Network(lambda net, x: net.c(torch.cat([net.a(x), net.b(net.b(x))], 1)) + x)
    network.a, network.b, network.c = conv3(3, 3), conv3(3, 3), nn.Conv2d(6, 3, 1)
    assert delays(network) == [(2, 2), (1, 1), (2, 2), (2, 2), (2, 2)]


def test_delays_of_dense_blocks():
    graph = read(RRDBNet(channels=8, blocks=2, growth=4))
    times = schedule(graph)
    # 2 groups of 3 blocks of 5 convolutions, plus the trunk's first and last one; then two enlargements.
    trunk = 2 * 15 + 2
    assert times.delay[graph.output] == 4 * trunk + 2 + 1 + 2
    assert times.delay["conv_first_1"] == trunk  # at the end of the trunk, where it is read


@pytest.mark.parametrize(("scale", "rate"), [(4, 1), (2, Fraction(1, 2)), (1, Fraction(1, 4))])
def test_rates_of_an_rrdb_network(scale, rate):
    network = RRDBNet(channels=8, blocks=1, growth=4, scale=scale, fold=4 // scale)
    graph = read(network, network.align)
    assert graph.scale == scale
    assert {float(v.rate) for v in graph.values.values()} == {1.0, *(float(rate * f) for f in (1, 2, 4))}
    assert graph.values["conv_body"].rate == rate
    assert graph.values["conv_hr"].rate == 4 * rate
    assert graph.values["conv_last"].channels == 3


def test_dtypes_and_layouts_of_values():
    network = SwinIR(dim=8, depths=(1,), heads=(2,), window=4, hidden=12, features=6).to_mixed(torch.bfloat16)
    values = read(network.eval(), 4).values
    first, qkv_input = values["conv_first"], values["to"]
    assert (first.channels, first.dtype, first.layout) == (8, torch.float32, Layout.NCHW)
    assert (qkv_input.channels, qkv_input.dtype, qkv_input.layout) == (8, torch.bfloat16, Layout.NHWC)
    assert values["layers_0_residual_group_blocks_0_mlp_fc1"].channels == 12


def test_views_are_no_operations():
    def forward(net, x):
        y = net.a(F.pad(net.drop(x.to(torch.float32)), (0, 0, 0, 0)))
        net.b(y)  # nobody reads it
        return y.permute(0, 2, 3, 1).permute(0, 3, 1, 2)

    graph = read(Network(forward, a=conv3(3, 3), b=conv3(3, 3), drop=nn.Dropout()).eval())
    assert [op.name for op in graph.ops] == [graph.output] == ["a"]


def test_concatenations_are_no_operations():
    network = Network(
        lambda net, x: net.b(torch.cat([torch.cat([x, net.a(x)], 1), x], 1)), a=conv3(3, 2), b=conv3(8, 3)
    )
    graph = read(network)
    assert [op.name for op in graph.ops] == ["a", "b"]
    assert graph.concatenations == {"cat": ("x", "a"), "cat_1": ("cat", "x")}


@pytest.mark.parametrize("scale", [4, 2, 1])
def test_rrdb_is_cut_before_its_first_enlargement(scale):
    network = RRDBNet(channels=8, blocks=1, growth=4, scale=scale, fold=4 // scale)
    graph = read(network, network.align)
    trunk, tail = split(graph)
    assert (*trunk.ops, *tail.ops) == graph.ops
    assert [op.name for op in tail.ops if op.rule.factor > 1] == ["interpolate", "interpolate_1"]
    assert tail.ops[0].name == "interpolate"
    assert (trunk.input, trunk.output, tail.output) == (graph.input, tail.input, graph.output)
    assert (trunk.scale, tail.scale) == (Fraction(scale, 4), 4)
    assert set(trunk.concatenations) == set(graph.concatenations)


def test_swinir_is_cut_after_its_last_window():
    trunk, tail = split(read(SwinIR(dim=8, depths=(2,), heads=(2,), window=4, hidden=12, features=6).eval(), 4))
    assert any(op.rule.grid != (1, 0) for op in trunk.ops)
    assert {op.rule.grid for op in tail.ops} == {(1, 0)}
    assert tail.scale == 4


def enlarged_skip(net, x):
    return F.pixel_shuffle(net.a(x), 2) + F.interpolate(x, scale_factor=2)


def test_networks_without_a_cut():
    networks = {
        "no enlargement": chain(a=conv3(3, 4), b=conv3(4, 3)),
        "enlargement first": chain(up=nn.Upsample(scale_factor=2), a=conv3(3, 3)),
        "enlarged skip around the trunk": Network(enlarged_skip, a=conv3(3, 12)),
        "windows behind the enlargement": chain(
            a=conv3(3, 4), up=nn.Upsample(scale_factor=2), late=windows(2), b=conv3(4, 3)
        ),
        "concatenation at the enlargement": Network(
            lambda net, x: net.b(F.interpolate(torch.cat([x, net.a(x)], 1), scale_factor=2)),
            a=conv3(3, 2),
            b=conv3(5, 3),
        ),
    }
    for name, network in networks.items():
        graph = read(network, 4)
        assert split(graph) == (graph,), name


@pytest.mark.parametrize("make", [rrdb, lambda: rrdb(2), swinir, lambda: swinir(5, 2), compact, span])
def test_the_radius_of_a_graph_is_the_architectures(make):
    network = make()
    assert radius(read(network, network.align), network.align) == network.radius


def over_rows(net, x):
    y = net.a(x).permute(0, 2, 3, 1)
    return net.b(y.softmax(1).permute(0, 3, 1, 2))


def over_all(net, x):
    tokens = net.a(x).flatten(2)
    weights = (tokens.transpose(1, 2) @ tokens).softmax(-1)
    return net.b((tokens @ weights).unflatten(2, x.shape[2:]))


def shared_in_place(net, x):
    y = net.a(x)
    return net.act(y) + y


UNBOUNDED = "it may read any number of rows"
CONVOLUTION = "only stride 1, odd kernels and zero padding that keeps the size have a rule"
FACTOR = "only a whole scale_factor, the same for rows and columns, has a rule"
LAYERS = [
    ("AdaptiveAvgPool2d", nn.AdaptiveAvgPool2d(8), UNBOUNDED),
    ("AvgPool2d", nn.AvgPool2d(3, 1, 1), UNBOUNDED),
    ("MaxPool2d", nn.MaxPool2d(2), UNBOUNDED),
    ("GroupNorm", nn.GroupNorm(2, 4), UNBOUNDED),
    ("InstanceNorm2d", nn.InstanceNorm2d(4), UNBOUNDED),
    ("LayerNorm", nn.LayerNorm((4, 8, 16)), UNBOUNDED),
    ("LayerNorm", on_tokens(nn.LayerNorm((16, 4))), UNBOUNDED),
    ("LayerNorm", on_tokens(nn.LayerNorm((8, 16, 4))), UNBOUNDED),
    ("Softmax", nn.Softmax(2), UNBOUNDED),
    ("BatchNorm2d", nn.BatchNorm2d(4).train(), UNBOUNDED),
    ("BatchNorm2d", nn.BatchNorm2d(4, track_running_stats=False).eval(), UNBOUNDED),
    ("ReflectionPad2d", nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)), UNBOUNDED),
    ("ConvTranspose2d", nn.ConvTranspose2d(4, 4, 4, 2, 1), "only kernels as large as their stride"),
    ("Conv2d", nn.Conv2d(4, 4, 3, stride=2, padding=1), CONVOLUTION),
    ("Conv2d", nn.Conv2d(4, 4, 2, stride=2, padding=1), CONVOLUTION),
    ("Conv2d", nn.Conv2d(4, 4, 2, padding=1), CONVOLUTION),
    ("Conv2d", nn.Conv2d(4, 4, (3, 4), padding=(1, 2)), CONVOLUTION),
    ("Conv2d", nn.Conv2d(4, 4, 3), CONVOLUTION),
    ("Conv2d", nn.Conv2d(4, 4, 3, padding=2), CONVOLUTION),
    ("Conv2d", nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), CONVOLUTION),
    ("Upsample", nn.Upsample(scale_factor=2, mode="bicubic"), "mode bicubic"),
    (
        "Upsample",
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        "mode bilinear with align_corners=True",
    ),
    ("Upsample", nn.Upsample(size=(16, 16)), FACTOR),
    ("Upsample", nn.Upsample(scale_factor=1.5), FACTOR),
    ("Upsample", nn.Upsample(scale_factor=(1.0, 2.0)), FACTOR),
]
FORWARDS = [
    ("softmax", over_rows, UNBOUNDED),
    ("flatten", over_all, UNBOUNDED),
    ("matmul", lambda net, x: net.b(net.a(x) @ torch.ones(16, 16)), UNBOUNDED),
    ("mean", lambda net, x: net.b(net.a(x) * net.a(x).mean((2, 3), keepdim=True)), UNBOUNDED),
    ("flip", lambda net, x: net.b(net.a(x).flip(2)), UNBOUNDED),
    ("roll", lambda net, x: net.b(torch.roll(net.a(x), 1, 2)), UNBOUNDED),
    ("narrow", lambda net, x: net.b(net.a(x).narrow(2, 1, 4)), UNBOUNDED),
    ("pad", lambda net, x: net.b(F.pad(net.a(x), (1, 1, 1, 1), "reflect")), UNBOUNDED),
    ("permute", lambda net, x: net.b(net.a(x).permute(0, 1, 3, 2)), "it moves axes other than"),
    (
        "cat",
        lambda net, x: net.b(torch.cat([net.a(x), net.a(x)], 2)),
        "it concatenates along another axis than channels",
    ),
    ("interpolate", lambda net, x: net.b(F.interpolate(net.a(x), scale_factor=0.5)), FACTOR),
]


def refusal_of(network):
    with pytest.raises(UsageError) as refused:
        read(network)
    return str(refused.value)


def check_refusal(network, kind, call, reason):
    """The message names the call and the reason in one line, and ends with advice."""
    message = refusal_of(network)
    assert re.fullmatch(
        rf"{kind} \({call}\): cannot be streamed in bands \({re.escape(reason)}[^()]*\); use executor='tiles'", message
    ), message


def test_refused_layers_are_named():
    for kind, layer, reason in LAYERS:
        network = Network(lambda net, x: net.b(net.odd_one(net.a(x))), a=conv3(3, 4), odd_one=layer, b=conv3(4, 3))
        check_refusal(network, kind, "odd_one(_0|_layer)?", reason)


def test_refused_functions_are_named():
    for name, forward, reason in FORWARDS:
        check_refusal(Network(forward, a=conv3(3, 4), b=conv3(4, 3)), name, name, reason)


def test_channel_layers_are_refused_on_nchw():
    """On [1, C, H, W] they would mix columns, whose number the plan does not know."""
    for kind, layer in [("LayerNorm", nn.LayerNorm(16)), ("Linear", nn.Linear(16, 16))]:
        check_refusal(chain(odd_one=layer, a=conv3(3, 3)), kind, "odd_one", UNBOUNDED)


def test_overwriting_a_shared_input_is_refused():
    network = Network(shared_in_place, a=conv3(3, 3), act=nn.ReLU(inplace=True))
    check_refusal(network, "ReLU", "act", "it overwrites an input that other operations read")


def test_refused_layers_are_accepted_with_other_arguments():
    """Each differs from a refused layer in the one property that the reason names."""
    layers = [
        nn.BatchNorm2d(4).eval(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding="same"),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=(2.0, 2.0)), nn.ReLU(inplace=True),
        on_tokens(nn.LayerNorm(4)), on_tokens(nn.Linear(4, 4)),
    ]  # fmt: skip
    for layer in layers:
        graph = read(Network(lambda net, x: net.b(net.c(net.a(x))), a=conv3(3, 4), c=layer, b=conv3(4, 3)))
        assert [op.name.removesuffix("_layer") for op in graph.ops] == ["a", "c", "b"]


def test_a_subclass_has_its_parents_rule():
    assert delays(chain(up=nn.UpsamplingNearest2d(scale_factor=2), a=conv3(3, 3))) == [(0, 0), (1, 1)]


def test_slope_of_a_leaky_relu():
    x = torch.tensor([-1.0, 1.0])
    for slope in (0.0, 0.01, 0.3):
        (op,) = read(chain(a=conv3(3, 3), act=nn.LeakyReLU(slope))).ops  # fused into the convolution
        output = torch.empty(2)
        op.rule.store([x], output)
        assert output.tolist() == pytest.approx([-slope, 1.0])
