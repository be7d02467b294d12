"""SwinIR: published size, attention against a dense formulation, receptive field, window grid."""

import pytest
import torch
from support.networks import check_radius
from torch.nn import functional as F

from engine.archs import build
from engine.archs.swinir import SwinIR, SwinLayer, canonical, detect
from engine.errors import AlignmentError, ModelError

SMALL = {"dim": 8, "depths": (2, 3), "heads": (2, 4), "window": 4, "hidden": 12, "features": 6}


def lively(module):
    """Weights under which attention depends on its input: as initialised it is nearly uniform and would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return module.eval().requires_grad_(False)


@pytest.fixture
def net():
    return lively(SwinIR(**SMALL))


def test_full_size():
    with torch.device("meta"):
        net = SwinIR()
    assert sum(parameter.numel() for parameter in net.parameters()) == 11_715_559
    assert (net.scale, net.align, net.radius) == (4, 8, 153)
    assert len(net.state_dict()) == len(list(net.parameters()))


def test_official_names():
    names = SwinIR(**SMALL).state_dict().keys()
    block = "layers.1.residual_group.blocks.2."
    of_block = {name.removeprefix(block) for name in names if name.startswith(block)}
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert of_block == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {
        "attn.relative_position_bias_table"
    }
    outside = {name.rpartition(".")[0] for name in names if ".residual_group." not in name}
    assert outside == {
        *("conv_first", "patch_embed.norm", "layers.0.conv", "layers.1.conv", "norm", "conv_after_body"),
        *("conv_before_upsample.0", "conv_up1", "conv_up2", "conv_hr", "conv_last"),
    }


@pytest.mark.parametrize("scale", [4, 2])
def test_size_is_read_from_the_tensors(scale):
    net = lively(SwinIR(**SMALL, scale=scale))
    state = net.state_dict()
    loaded = build(state)
    assert (loaded.depths, loaded.align, loaded.scale) == ((2, 3), 4, scale)
    x = torch.rand(1, 3, 8, 12)
    assert loaded(x).shape == (1, 3, 8 * scale, 12 * scale)
    assert torch.equal(loaded(x), net(x))


def test_noise_channels_have_their_own_weights(net):
    noisy = lively(SwinIR(**SMALL, noise_channels=3))
    assert noisy.state_dict().keys() - net.state_dict().keys() == {"conv_noise.weight"}
    noisy.load_state_dict({**net.state_dict(), "conv_noise.weight": torch.randn(8, 3, 3, 3)})
    x, noise = torch.rand(1, 3, 8, 12), torch.randn(1, 3, 8, 12)
    torch.testing.assert_close(noisy(torch.cat([x, 0 * noise], 1)), net(x), rtol=0, atol=1e-5)
    assert (noisy(torch.cat([x, noise], 1)) - net(x)).abs().max() > 0.01
    loaded = build(noisy.state_dict())
    assert torch.equal(loaded(torch.cat([x, noise], 1)), noisy(torch.cat([x, noise], 1)))


def test_buffers_of_official_files_are_dropped(net):
    state = net.state_dict()
    block = "layers.0.residual_group.blocks.1."
    names = ("mean", block + "attn_mask", block + "attn.relative_position_index")
    state_and_more = state | dict.fromkeys(names, torch.zeros(1))
    assert detect(state_and_more)
    assert canonical(state_and_more).keys() == state.keys()


def test_bias_table_without_a_window(net):
    table = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ModelError, match="48 rows"):
        SwinIR.from_shapes(net.state_dict() | {table: torch.zeros(48, 2)})


def test_impossible_sizes():
    for change, message in [
        ({"heads": (3, 3)}, "3 attention heads"),
        ({"scale": 3}, r"scale 3 with head nearest\+conv"),
        ({"scale": 2, "head": "none"}, "scale 2 with head none"),
        ({"noise_channels": 3, "scale": 2, "fold": 2}, "fold 2: has a head and no noise"),
    ]:
        with pytest.raises(ModelError, match=message):
            SwinIR(**SMALL | change)


def dense_attention(layer, x, window, shift):
    """The layer's attention over all pixels of one image: two see each other in the same cell of the shifted grid.

    Nothing is rolled: cells at the border are cut off. Equality proves the module's masks, and with them the definition
    of the kernel ``window_attention``.
    """
    attn, (height, width, dim) = layer.attn, x.shape
    y, x_at = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x_at = y.flatten(), x_at.flatten()
    cell = (y - shift).div(window, rounding_mode="floor") * 1000 + (x_at - shift).div(window, rounding_mode="floor")
    visible = cell[:, None] == cell[None, :]
    far = window - 1
    down = (y[:, None] - y[None, :]).clamp(-far, far) + far
    right = (x_at[:, None] - x_at[None, :]).clamp(-far, far) + far
    bias = attn.relative_position_bias_table[down * (2 * window - 1) + right]  # [HW, HW, heads]
    query, key, value = F.linear(x.flatten(0, 1), attn.qkv.weight, attn.qkv.bias).chunk(3, -1)
    heads = []
    for h, part in enumerate(torch.arange(dim).chunk(attn.heads)):
        logits = query[:, part] @ key[:, part].T / len(part) ** 0.5 + bias[..., h]
        heads.append(logits.masked_fill(~visible, -torch.inf).softmax(-1) @ value[:, part])
    return F.linear(torch.cat(heads, -1), attn.proj.weight, attn.proj.bias).view(height, width, dim)


@pytest.mark.parametrize("shift", [0, 2])
def test_attention_equals_dense_attention(shift):
    layer = lively(SwinLayer(8, heads=2, window=4, shift=shift, hidden=12))
    for size in [(8, 12), (4, 4), (4, 8)]:
        x = torch.randn(2, *size, 8)
        images = (F.layer_norm(image, (8,), *layer.norm1.parameters()) for image in x)
        y = x + torch.stack([dense_attention(layer, image, 4, shift) for image in images])
        y = y + layer.mlp(layer.norm2(y))
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "scale", "options"),
    [
        ("pixelshuffle", 3, {}),
        ("pixelshuffle", 8, {"convs": 3}),
        ("pixelshuffledirect", 3, {}),
        ("none", 1, {"convs": 3}),
        ("nearest+conv", 8, {}),
        ("nearest+conv", 2, {"fold": 2}),
    ],
)
def test_radius_of_every_head(head, scale, options):
    check_radius(lively(SwinIR(4, (2,), (1,), 4, 4, 2, scale, head=head, **options)))


@pytest.mark.parametrize(("depths", "window", "scale"), [((2, 2), 4, 4), ((3,), 4, 2), ((2,), 5, 4)])
def test_radius_is_the_gradients_support(depths, window, scale):
    check_radius(lively(SwinIR(4, depths, [1] * len(depths), window, 4, 2, scale)))


@pytest.mark.parametrize(("phase", "same"), [(0, True), (2, False)])
def test_tiles_must_sit_on_the_window_grid(net, phase, same):
    x = torch.rand(1, 3, 8, 160)
    halo = -(-net.radius // 4) * 4
    first, last = 60 + phase, 100 + phase
    whole = net(x)[..., 4 * first : 4 * last]
    tile = net(x[..., first - halo : last + halo])[..., 4 * halo : -4 * halo]
    error = (tile - whole).abs().max() / whole.abs().max()
    assert error < 1e-5 if same else error > 1e-2


def test_images_off_the_window_grid_are_refused(net):
    with pytest.raises(AlignmentError, match=r"10 x 16 pixels: no multiple of the window of 4; .* to 12 x 16"):
        net(torch.rand(1, 3, 10, 16))


def test_batch_is_independent(net):
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(net(x), torch.cat([net(x[:1]), net(x[1:])]), rtol=0, atol=1e-3)


def test_trains():
    net = SwinIR(**SMALL)
    net(torch.rand(1, 3, 8, 8)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_mixed_precision(net):
    x = torch.rand(1, 3, 8, 8)
    exact = net(x)
    assert net.to_mixed(torch.bfloat16) is net
    uncast = {name for name, weight in net.named_parameters() if weight.dtype == torch.float32}
    always = ("norm", "bias_table", "conv_first", "conv_last")
    assert uncast == {name for name in dict(net.named_parameters()) if any(part in name for part in always)}
    stream = net.layers(net.conv_first(x).permute(0, 2, 3, 1))
    assert stream.dtype == torch.float32
    assert net(x).dtype == torch.float32
    assert 0 < (net(x) - exact).abs().max() < 0.05 * exact.abs().max()
