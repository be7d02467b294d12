"""RRDBNet: published size, plain formulation, three namings, receptive field, half precision."""

import copy
import re

import pytest
import torch
from support.networks import check_radius
from torch.nn import functional as F

from engine.archs import build
from engine.archs.esrgan import RESIDUAL, RRDBNet, canonical, detect
from engine.errors import ModelError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return RRDBNet(channels=8, blocks=2, growth=4).eval().requires_grad_(False)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def plain_forward(state, x, blocks, fold=1):
    """The network as one function of named tensors, written from the paper."""

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def active(name, x):
        return F.leaky_relu(conv(name, x), 0.2)

    def double(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    first = trunk = conv("conv_first", F.pixel_unshuffle(x, fold))
    for i in range(blocks):
        inner = trunk
        for j in (1, 2, 3):
            maps = [inner]
            for k in (1, 2, 3, 4):
                maps.append(active(f"body.{i}.rdb{j}.conv{k}", torch.cat(maps, 1)))
            inner = conv(f"body.{i}.rdb{j}.conv5", torch.cat(maps, 1)) * 0.2 + inner
        trunk = inner * 0.2 + trunk
    x = first + conv("conv_body", trunk)
    x = active("conv_up2", double(active("conv_up1", double(x))))
    return conv("conv_last", active("conv_hr", x))


def first_release(name):
    name = re.sub(r"^body\.(\d+)\.rdb(\d)\.conv(\d)", r"model.1.sub.\1.RDB\2.conv\3.0", name)
    head, _, kind = name.rpartition(".")
    places = {"conv_first": "model.0", "conv_body": "model.1.sub.2", "conv_up1": "model.3"}
    places |= {"conv_up2": "model.6", "conv_hr": "model.8", "conv_last": "model.10"}
    return f"{places.get(head, head)}.{kind}"


def second_release(name):
    name = re.sub(r"^body\.(\d+)\.rdb", r"RRDB_trunk.\1.RDB", name)
    name = name.replace("conv_body", "trunk_conv").replace("conv_hr", "HRconv")
    return name.replace("conv_up", "upconv")


def test_full_size():
    with torch.device("meta"):
        net = RRDBNet()
    assert count(net) == 16_697_987
    assert (net.scale, net.align, net.radius) == (4, 1, 349)


def test_equals_the_plain_formulation(net):
    x = torch.rand(2, 3, 9, 12)
    torch.testing.assert_close(net(x), plain_forward(net.state_dict(), x, blocks=2), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("scale", "fold"), [(2, 2), (1, 4)])
def test_smaller_scales_fold_pixels_first(scale, fold):
    net = RRDBNet(channels=8, blocks=1, growth=4, scale=scale, fold=fold).eval().requires_grad_(False)
    x = torch.rand(1, 3, 8, 12)
    assert net(x).shape == (1, 3, 8 * scale, 12 * scale)
    torch.testing.assert_close(net(x), plain_forward(net.state_dict(), x, blocks=1, fold=fold), rtol=0, atol=2e-6)
    assert net.align == fold
    assert build(net.state_dict()).scale == scale


@pytest.mark.parametrize("rename", [str, first_release, second_release])
def test_three_namings_are_the_same_network(net, rename):
    state = {rename(name): tensor for name, tensor in net.state_dict().items()}
    assert detect(state)
    assert canonical(state).keys() == net.state_dict().keys()
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(build(state)(x), net(x))


def test_size_is_read_from_the_tensors():
    net = RRDBNet.from_shapes(RRDBNet(channels=6, blocks=3, growth=5).state_dict())
    assert (net.conv_body.in_channels, len(net.body), net.body[0].rdb1.conv1.out_channels) == (6, 3, 5)


def test_networks_of_other_images_are_refused(net):
    for inputs in (1, 5, 27):
        with pytest.raises(ModelError, match=f"takes {inputs} channels and yields 3"):
            RRDBNet.from_shapes(net.state_dict() | {"conv_first.weight": torch.zeros(8, inputs, 3, 3)})


def test_noise_channels_have_their_own_weights(net):
    noisy = RRDBNet(channels=8, blocks=2, growth=4, noise_channels=3).eval().requires_grad_(False)
    assert noisy.state_dict().keys() - net.state_dict().keys() == {"conv_noise.weight"}
    noisy.load_state_dict({**net.state_dict(), "conv_noise.weight": torch.randn(8, 3, 3, 3)})
    x, noise = torch.rand(1, 3, 9, 12), torch.randn(1, 3, 9, 12)
    torch.testing.assert_close(noisy(torch.cat([x, 0 * noise], 1)), net(x), rtol=0, atol=1e-6)
    assert (noisy(torch.cat([x, noise], 1)) - net(x)).abs().max() > 0.01
    loaded = build(noisy.state_dict())
    assert loaded.noise_channels == 3
    assert torch.equal(loaded(torch.cat([x, noise], 1)), noisy(torch.cat([x, noise], 1)))


def test_new_noise_channels_are_quiet_and_trainable():
    net = RRDBNet(channels=64, blocks=1, noise_channels=16)
    x, noise = torch.full((1, 3, 16, 16), 0.5), torch.randn(1, 16, 16, 16)
    with_noise, without = (net(torch.cat([x, part], 1)) for part in (noise, 0 * noise))
    assert 0 < (with_noise - without).std() < 0.1
    with_noise.square().mean().backward()
    assert net.conv_noise.weight.grad.abs().max() > 0


def test_impossible_sizes():
    with pytest.raises(ModelError, match="with noise channels and fold 2"):
        RRDBNet(8, 1, 4, scale=2, noise_channels=3, fold=2)
    for scale, fold in [(3, 1), (0, 1), (32, 1), (1, 3)]:
        with pytest.raises(ModelError, match=f"scale {scale} with fold {fold}"):
            RRDBNet(8, 1, 4, scale=scale, fold=fold)


def test_traceable(net):
    traced = torch.fx.symbolic_trace(net)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(traced(x), net(x))
    # Every node is a layer, an operator or a cast: weights appear inside their modules only.
    assert "get_attr" not in {node.op for node in traced.graph.nodes}


@pytest.mark.parametrize(("scale", "fold"), [(4, 1), (2, 2), (1, 4), (1, 1), (2, 1), (8, 1), (4, 4)])
def test_radius_is_the_gradients_support(scale, fold):
    check_radius(RRDBNet(channels=2, blocks=1, growth=1, scale=scale, fold=fold, image_channels=3 if fold > 1 else 1))


def test_mixed_precision(net):
    x = torch.rand(1, 3, 16, 16)
    exact = net(x)
    assert net.to_mixed(torch.bfloat16) is net
    uncast = {name for name, weight in net.named_parameters() if weight.dtype == torch.float32}
    assert uncast == {f"{layer}.{kind}" for layer in ("conv_first", "conv_last") for kind in ("weight", "bias")}
    assert net.body(net.conv_first(x)).dtype == torch.float32
    mixed = net(x)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).abs().max() < 0.01 * exact.abs().max()
    assert torch.equal(torch.fx.symbolic_trace(net)(x), mixed)


def test_residuals_in_half_precision_within_a_group(net):
    """Sums of groups stay float32; tensors that the network shares with a checkpoint stay as they were."""
    x, weight = torch.rand(1, 3, 16, 16), net.body[0].rdb1.conv5.weight
    exact, mixed, before = net(x), copy.deepcopy(net).to_mixed(torch.bfloat16)(x), weight.clone()
    assert net.to_inference(torch.bfloat16) is net
    assert torch.equal(weight, before)
    group = net.body[0]
    assert torch.equal(group.rdb1.conv5.weight, (before * RESIDUAL).bfloat16())
    assert group.rdb1(torch.rand(1, group.rdb1.conv1.in_channels, 8, 8).bfloat16()).dtype == torch.bfloat16
    assert net.body(net.conv_first(x)).dtype == torch.float32
    error, error_of_mixed = (float((result - exact).abs().mean()) for result in (net(x), mixed))
    assert 0 < error < 1.5 * error_of_mixed


def test_sums_in_half_precision_have_the_same_bits_in_every_layout(net):
    """Bands then equal the whole image. PyTorch rounds a sum with a factor differently in vectors and in single numbers."""
    x, y = torch.rand(2, 1, 20, 9, 13).bfloat16()
    expected = (x.float() + y.float()).bfloat16()
    wide = torch.empty(1, 9, 13, 25, dtype=torch.bfloat16)
    for first, second in ((x, y), (x.to(memory_format=torch.channels_last), y)):
        assert torch.equal(torch.add(first, second, alpha=1.0), expected)
        out = wide[..., :20].permute(0, 3, 1, 2)
        assert torch.equal(torch.add(first, second, alpha=1.0, out=out), expected)


def test_bfloat16_throughout(net):
    assert net.bfloat16()(torch.rand(1, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
