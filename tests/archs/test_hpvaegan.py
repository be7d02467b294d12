"""Step 1's generator: published sizes, vertical coordinates, gradients of its padding, and sampling."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from engine.archs.hpvaegan import (
    BaseGenerator,
    Config,
    Decoder,
    GeneratorBlock,
    SpatialNorm,
    VerticalCoordConv2d,
    mirrored_coordinates,
    scale_sizes,
    vertical_coordinates,
)
from engine.errors import UsageError
from engine.model.bundle import open_structure
from engine.model.structure_file import structure_metadata
from engine.training.structure.networks import conv_input_gradient

TINY = Config(last=3, last_vae=1, channels=6, latent=5, layers=2)
PADDINGS = ("zeros", "reflect", "replicate", "circular")
ALL_PADDINGS = pytest.mark.parametrize("padding", PADDINGS)


def noise(seed):
    return lambda m, shape: torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + m))


def tiny(config=TINY):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = BaseGenerator(config, scale_sizes((36, 48), config.last, 32, 8))
    generator.sigmas[:] = torch.tensor([1.0, 0.3, 0.2, 0.1])
    return generator


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("coordinates", "decoder", "block", "whole"),
    [(False, 260_931, 188_931, 1_961_310), (True, 264_414, 192_414, 1_996_140)],
)
def test_parameter_counts(coordinates, decoder, block, whole):
    config = Config(coordinates=coordinates)
    assert count(Decoder(config)) == decoder
    assert count(GeneratorBlock(config)) == block
    assert count(BaseGenerator(config, scale_sizes((2160, 4096)))) == whole


def test_impossible_configurations():
    with pytest.raises(UsageError, match="L = 4"):
        Config(last=3, last_vae=4)
    with pytest.raises(UsageError, match="symmetric"):
        Config(padding="symmetric")
    with pytest.raises(UsageError, match="2 sizes for 4 scales"):
        BaseGenerator(TINY, [(1, 1), (2, 2)])


def test_sizes_keep_the_reference_rounding():
    widths = [33, 41, 51, 65, 81, 102, 129, 162, 204, 256]
    assert [w for _, w in scale_sizes((2160, 4096))] == widths
    assert [h for h, _ in scale_sizes((2160, 4096))] == [17, 21, 26, 34, 42, 53, 68, 85, 107, 135]
    assert [h for h, _ in scale_sizes((2728, 4096))] == [21, 27, 33, 43, 53, 67, 85, 107, 135, 170]
    assert scale_sizes((2448, 3264))[0] == (24, 33)
    assert scale_sizes((2448, 3264))[-1] == (192, 256)
    assert scale_sizes((4096, 1024))[-1] == (1024, 256)
    assert scale_sizes((10, 4096))[0] == (1, 33)
    assert scale_sizes((100, 100), 0) == ((256, 256),)


def test_coordinates_run_from_top_to_bottom():
    assert vertical_coordinates(1).tolist() == [0.0]
    assert vertical_coordinates(2).tolist() == [-1.0, 1.0]
    for height in (3, 17, 192):
        expected = [-1 + 2 * i / (height - 1) for i in range(height)]
        assert vertical_coordinates(height).tolist() == pytest.approx(expected, abs=1e-6)


def test_coordinates_reach_the_convolution():
    conv = VerticalCoordConv2d(2, 1)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[0, 2, 1, 1] = 1
    for height in (1, 2, 7):
        output = conv(torch.randn(3, 2, height, 5))
        assert torch.equal(output, vertical_coordinates(height).view(1, 1, height, 1).expand(3, 1, height, 5))


@pytest.mark.parametrize(("padding", "outside"), [("zeros", 0.0), ("replicate", -1.0), ("reflect", -0.5)])
def test_coordinates_are_padded_like_features(padding, outside):
    conv = VerticalCoordConv2d(1, 1, padding=padding)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[0, 1, 0, 1] = 1  # the row above
    assert conv(torch.zeros(1, 1, 5, 4))[0, 0, :, 2].tolist() == [outside, -1.0, -0.5, 0.0, 0.5]


def concatenated(conv, x):
    """CoordConv as usually written: the coordinate is concatenated to the input."""
    n, _, height, width = x.shape
    rows = mirrored_coordinates(height) if all(conv.wraps) else vertical_coordinates(height)
    y = rows.to(x).view(1, 1, height, 1).expand(n, 1, height, width)
    x = torch.cat([x, y], 1) if conv.coordinates else x
    mode = "circular" if all(conv.wraps) else {"zeros": "constant"}.get(conv.border, conv.border)
    mode = "replicate" if mode == "reflect" and min(height, width) == 1 else mode
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), conv.weight, conv.bias)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from(PADDINGS), st.booleans())
def test_convolution_is_coordconv(height, width, padding, coordinates):
    """Values and the gradients w.r.t. input, weight and bias, at every size and border."""
    conv = VerticalCoordConv2d(3, 4, padding=padding, coordinates=coordinates).double()
    x = torch.randn(2, 3, height, width).double().requires_grad_()
    output, expected = conv(x), concatenated(conv, x)
    assert output.shape == (2, 4, height, width)
    torch.testing.assert_close(output, expected)
    gradient, sources = torch.randn_like(expected), (x, conv.weight, conv.bias)
    gradients = torch.autograd.grad(expected, sources, gradient)
    for ours, theirs in zip(torch.autograd.grad(output, sources, gradient), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(conv_input_gradient(conv, gradient, conv.weight), gradients[0])


def test_convolution_without_coordinates_is_torchs():
    conv = VerticalCoordConv2d(3, 4, coordinates=False)
    x = torch.randn(1, 3, 9, 8)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


@pytest.mark.parametrize("padding", ["reflect", "replicate"])
def test_padding_has_torchs_gradients_and_saves_less(padding):
    conv = VerticalCoordConv2d(2, 3, padding=padding).double()
    x = torch.rand(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv, (x,))
    assert torch.autograd.gradgradcheck(conv, (x,))
    saved = []
    conv = VerticalCoordConv2d(8, 8, coordinates=False, padding=padding)
    x = torch.rand(1, 8, 32, 32, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.autocast("cpu"):
        output = conv(x.requires_grad_())
        expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode=padding), conv.weight, conv.bias)
    assert torch.equal(output, expected)
    assert [(t.dtype, tuple(t.shape)) for t in saved[:2]] == [
        (torch.bfloat16, (1, 8, 34, 34)),
        (torch.bfloat16, (8, 8, 3, 3)),
    ]


def test_norm_is_batch_norm_of_one_image():
    norm, reference = SpatialNorm(4), nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(4))
        norm.bias.copy_(torch.randn(4))
        reference.weight.copy_(norm.weight)
        reference.bias.copy_(norm.bias)
    x = torch.randn(2, 4, 5, 6) * 3 + 1
    separately = torch.cat([reference(x[:1]), reference(x[1:])])
    torch.testing.assert_close(norm(x), separately)
    assert norm(torch.ones(1, 4, 1, 1)).flatten().tolist() == norm.bias.tolist()


def test_sample_is_deterministic_and_in_range():
    generator = tiny()
    image = generator.sample(noise(1))
    assert image.shape == (3, 24, 32)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert not image.requires_grad
    assert 0 <= image.min() < image.max() <= 1
    assert torch.equal(image, generator.sample(noise(1)))
    assert not torch.equal(image, generator.sample(noise(2)))
    assert generator.sample(noise(1), last=1).shape == (3, *generator.sizes[1])


@ALL_PADDINGS
def test_sample_of_any_size(padding):
    generator = tiny(Config(last=3, last_vae=1, channels=6, latent=5, layers=2, padding=padding))
    for size in [(24, 32), (24, 80), (50, 33), (7, 5), (1, 1), (1, 40), (40, 1)]:
        image = generator.sample(noise(0), size)
        assert image.shape == (3, *size)
        assert bool(image.isfinite().all())


def test_other_sizes_scale_every_inner_size():
    generator = BaseGenerator(Config(), scale_sizes((2160, 4096)))
    assert generator.sizes_for(generator.base_size) == generator.sizes
    wide = generator.sizes_for((135, 512))
    assert wide[0] == (17, 66)
    assert wide[-1] == (135, 512)
    assert generator.sizes_for((1, 1))[0] == (1, 1)
    with pytest.raises(UsageError, match="0x5"):
        generator.sizes_for((5, 0))


def test_noise_enters_above_the_vae_scales_only():
    calls = []

    def record(m, shape):
        calls.append((m, shape))
        return torch.zeros(shape)

    tiny().sample(record)
    assert calls == [(0, (5, 6, 8)), (2, (3, 15, 21)), (3, (3, 24, 32))]


def test_sample_follows_the_formula():
    generator, draw = tiny(), noise(3)
    image = torch.tanh(generator.decoder(draw(0, (5, 6, 8))[None]))
    for m, size in list(enumerate(generator.sizes))[1:]:
        up = F.interpolate(image, size, mode="bilinear", align_corners=True)
        entry = up + generator.sigmas[m] * draw(m, (3, *size))[None] if m > 1 else up
        image = torch.tanh(up + generator.blocks[m - 1](entry))
    torch.testing.assert_close(generator.sample(draw), (image[0].detach() + 1) / 2, atol=1e-5, rtol=0)


def test_committed_model():
    generator = open_structure(Path(__file__).parents[2] / "models" / "picosdeeuropa.safetensors")
    metadata = structure_metadata(generator)
    assert generator.base_size == (192, 256)
    assert metadata["licence"] == "CC-BY-4.0"
    assert "Aitzol Berasategi" in metadata["source"]
    image = generator.sample(noise(0))
    top, bottom = image[:, :48].mean((1, 2)), image[:, -48:].mean((1, 2))
    assert top[2] > top[0]  # a blue sky
    assert bottom[1] > bottom[2]  # above a green and brown meadow
