"""The packed last convolution: a network keeps its pixels, whole and in bands, by the definition and by the kernel."""

import copy

import pytest
import torch
from support.kernels import needs_triton
from support.networks import compact, lively, rrdb, span, swinir
from support.streams import pour, stream, whole

from engine.archs import to_mixed
from engine.archs.esrgan import RRDBNet
from engine.archs.last_conv import PackedLastConv
from engine.archs.swinir import SwinIR
from engine.kernels.launch import use_kernel


@pytest.fixture
def network():
    return lively(RRDBNet(channels=16, blocks=1, growth=8))


def test_definition_is_the_plain_convolution(network):
    image = torch.rand(1, 3, 9, 14)
    plain = copy.deepcopy(network).to_inference(torch.bfloat16)
    packed = to_mixed(network, torch.bfloat16, kernels=True)
    assert isinstance(packed.conv_last, PackedLastConv)
    with torch.inference_mode():
        assert torch.equal(packed(image), plain(image))


@pytest.mark.parametrize(
    "make", [compact, span, lambda: swinir(scale=3, head="pixelshuffledirect"), lambda: rrdb(image_channels=1)]
)
def test_networks_without_such_a_convolution_keep_theirs(make):
    network, image = make(), torch.rand(1, 3, 8, 12)
    exact = network(image)
    mixed = to_mixed(network, torch.bfloat16, kernels=True)
    assert not any(isinstance(module, PackedLastConv) for module in mixed.modules())
    result = mixed(image)
    assert result.dtype == torch.float32
    assert 0 < (result - exact).abs().max() < 0.05 * exact.abs().max()


def test_bands_equal_the_whole_image(network):
    packed, image = to_mixed(network, torch.bfloat16, kernels=True), torch.rand(3, 40, 12)
    expected = whole(packed, image)
    assert (pour(stream(packed, 8, 12, 4), image) - expected).abs().max() <= 2e-6 * expected.abs().max()


@needs_triton
@pytest.mark.parametrize("kind", ["esrgan", "swinir"])
def test_kernel_gives_the_pixels_of_the_definition(network, monkeypatch, kind):
    if kind == "swinir":
        network = lively(SwinIR(dim=20, depths=(1,), heads=(2,), hidden=36, features=16), 0.2)
    packed, image = to_mixed(network, torch.float16, kernels=True), torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        expected = packed(image)
        take = lambda device, forced: use_kernel(device, True if forced is None else forced)  # noqa: E731
        monkeypatch.setattr("engine.kernels.last_conv.use_kernel", take)
        result = packed(image)
    assert not torch.equal(result, expected)  # sums in another order: it was the kernel
    assert (result - expected).abs().max() <= 2e-6 * expected.abs().max()
