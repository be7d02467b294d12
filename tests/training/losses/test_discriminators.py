"""Discriminators have the published shapes and sizes, see the stated receptive field, and learn."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.errors import UsageError
from engine.training.losses.discriminators import PROJECTED_LAYERS, VGG, Patch, UNet, build
from engine.training.losses.gan import discriminator_loss


def conv(inputs, outputs, kernel, bias=True):
    return inputs * outputs * kernel**2 + bias * outputs


def count(network):
    return sum(p.numel() for p in network.parameters())


def vgg_parameters(crop, c=64):
    """Number of weights by the layers' shapes; a convolution before a norm has no bias."""
    widths = [c, 2 * c, 4 * c, 8 * c, 8 * c]
    total = conv(3, c, 3) + conv(c, c, 4, bias=False) + 2 * c
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        total += conv(inputs, outputs, 3, bias=False) + conv(outputs, outputs, 4, bias=False) + 4 * outputs
    return total + (8 * c * (crop // 32) ** 2 + 1) * 100 + 101


def test_vgg_has_the_published_size():
    assert vgg_parameters(128) == 14_499_401  # BasicSR's VGGStyleDiscriminator128
    assert count(VGG(128)) == 14_499_401


def test_vgg_of_other_crops():
    for crop, channels in ((32, 4), (96, 8), (160, 4)):
        network = build("vgg", crop, channels)
        assert count(network) == vgg_parameters(crop, channels)
        assert network(torch.rand(2, 3, crop, crop)).shape == (2, 1)


def test_unet_has_the_published_size():
    down = conv(64, 128, 4, False) + conv(128, 256, 4, False) + conv(256, 512, 4, False)
    up = conv(512, 256, 3, False) + conv(256, 128, 3, False) + conv(128, 64, 3, False)
    assert conv(3, 64, 3) + down + up + 2 * conv(64, 64, 3, False) + conv(64, 1, 3) == 4_376_897
    assert count(UNet()) == 4_376_897


def test_patch_size():
    expected = conv(3, 32, 4) + conv(32, 64, 4) + conv(64, 128, 4) + conv(128, 128, 3) + conv(128, 1, 3)
    assert count(Patch()) == expected == 314_337


def test_default_widths_are_the_published_ones():
    assert build("patch", 64).state_dict().keys() == Patch().state_dict().keys()
    assert count(build("patch", 64)) == count(Patch())
    assert count(build("unet", 64)) == 4_376_897


def test_unet_is_the_published_graph():
    """Real-ESRGAN's forward pass in plain operations."""
    network = UNet(6).eval()
    x = torch.rand(2, 3, 24, 40)

    def act(layer, value, **options):
        return F.leaky_relu(F.conv2d(value, layer.weight, layer.bias, padding=1, **options), 0.2)

    def twice(value):
        return F.interpolate(value, scale_factor=2, mode="bilinear", align_corners=False)

    x0 = act(network.first, x)
    x1 = act(network.down[0], x0, stride=2)
    x2 = act(network.down[1], x1, stride=2)
    x3 = act(network.down[2], x2, stride=2)
    x4 = act(network.up[0], twice(x3)) + x2
    x5 = act(network.up[1], twice(x4)) + x1
    x6 = act(network.up[2], twice(x5)) + x0
    out = act(network.head[1], act(network.head[0], x6))
    out = F.conv2d(out, network.last.weight, network.last.bias, padding=1)
    assert out.shape == (2, 1, 24, 40)
    torch.testing.assert_close(network(x), out)


def test_receptive_field_of_patch():
    for layers, side in ((1, 12), (2, 26), (3, 54)):
        x = torch.rand(1, 3, 128, 128, requires_grad=True)
        scores = Patch(4, layers)(x)
        assert scores.shape == (1, 1, 128 >> layers, 128 >> layers)
        middle = scores.shape[-1] // 2
        scores[0, 0, middle, middle].backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert rows[-1] - rows[0] + 1 == side


@pytest.mark.parametrize("name", ["unet", "patch"])
def test_spectral_norm(name):
    network = build(name, 32, 8)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    normed = [m for m in convolutions if nn.utils.parametrize.is_parametrized(m)]
    assert len(convolutions) - len(normed) == (2 if name == "unet" else 1)
    with torch.no_grad():
        for layer in normed:
            layer.parametrizations.weight.original.mul_(7)
        for _ in range(100):  # each call is one step of the power iteration
            network(torch.rand(1, 3, 32, 32))
    for layer in normed:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_scores_are_independent_in_a_batch():
    for name in ("unet", "patch"):
        network = build(name, 32, 4).eval()  # in training every call refines the norm
        batch = torch.rand(3, 3, 32, 32)
        torch.testing.assert_close(network(batch)[1:2], network(batch[1:2]))


@pytest.mark.parametrize("name", ["vgg", "unet", "patch"])
def test_learns_soft_from_sharp(name):
    """Both kinds are in one batch: BatchNorm over a single kind would remove their difference."""
    network = build(name, 32, 4)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)

    def judge():
        sharp = torch.rand(4, 3, 32, 32)
        return network(torch.cat((sharp, F.avg_pool2d(sharp, 3, 1, 1)))).chunk(2)

    for _ in range(60):
        loss = discriminator_loss("vanilla", *judge())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    sharp, soft = judge()
    assert sharp.mean() > soft.mean() + 1


def random_maps(x):
    """Maps of an image with the shapes of VGG's, by random filters."""
    maps = {}
    for layer, (width, halvings) in PROJECTED_LAYERS.items():
        kernel = torch.randn(width, 3, 3, 3, generator=torch.Generator().manual_seed(width))
        maps[layer] = F.conv2d(F.avg_pool2d(x, 1 << halvings), kernel, padding=1).relu()
    return maps


def test_projected_ignores_the_scale_of_maps():
    torch.manual_seed(0)
    network = build("projected", 64, 4).eval()
    other = copy.deepcopy(network)
    maps = random_maps(torch.rand(2, 3, 64, 48))
    scores = network(maps)
    assert scores.shape == (2, 4, 8, 6)
    torch.testing.assert_close(other({layer: 1000 * values for layer, values in maps.items()}), scores)
    torch.testing.assert_close(network(random_maps(torch.rand(1, 3, 64, 48))).shape, torch.Size((1, 4, 8, 6)))
    deviations = network.state_dict()["deviations"]
    assert torch.equal(deviations, torch.stack([values.std() for values in maps.values()]))  # of the first call


def test_projected_learns_soft_from_sharp():
    torch.manual_seed(0)
    network = build("projected", 32, 8)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(30):
        sharp = torch.rand(4, 3, 32, 32)
        real, fake = network(random_maps(sharp)), network(random_maps(F.avg_pool2d(sharp, 3, 1, 1)))
        optimiser.zero_grad()
        discriminator_loss("hinge", real, fake).backward()
        optimiser.step()
    assert real.mean() > fake.mean() + 0.5


def test_refusals_are_one_line():
    refusals = [
        (lambda: build("vgg", 100), "100 x 100 pixels: sides must be multiples of 32"),
        (lambda: build("unet", 100), "100 x 100 pixels: sides must be multiples of 8"),
        (lambda: build("patch", 4), "4 x 4 pixels: sides must be multiples of 8"),
        (lambda: build("vgg", 0), "0 x 0 pixels"),
        (lambda: build("vgg", 128, 0), "channels = 0"),
        (lambda: build("projected", 100), "100 x 100 pixels: sides must be multiples of 8"),
        (lambda: build("dcgan", 128), "'dcgan': unknown; use one of vgg, unet, patch, projected"),
        (lambda: Patch(8, layers=0), "layers = 0"),
        (lambda: VGG(64, 4)(torch.rand(2, 3, 96, 64)), "96 x 64 pixels: the discriminator takes 64 x 64"),
        (lambda: UNet(4)(torch.rand(1, 3, 32, 36)), "32 x 36 pixels"),
        (lambda: Patch(4)(torch.rand(1, 3, 4, 32)), "4 x 32 pixels"),
    ]
    for make, message in refusals:
        with pytest.raises(UsageError, match=message) as error:
            make()
        assert "\n" not in str(error.value), message
