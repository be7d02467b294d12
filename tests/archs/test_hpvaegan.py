"""Step 1's networks: sizes, counts, coordinates, sampling and files. Training is in tests/training."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from engine.archs.hpvaegan import (
    METADATA_KEY,
    BaseGenerator,
    Config,
    Decoder,
    Discriminator,
    Encoder,
    GeneratorBlock,
    SpatialNorm,
    VerticalCoordConv2d,
    scale_sizes,
    vertical_coordinates,
)
from engine.errors import ModelError, UsageError
from engine.model.bundle import open_structure

TINY = Config(last=3, last_vae=1, channels=6, latent=5, layers=2)


def noise(seed):
    return lambda m, shape: torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + m))


def tiny(config=TINY, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        structure = BaseGenerator(
            config, scale_sizes((36, 48), config.last, 32, 8), {"seed": seed, "licence": "CC0-1.0"}
        )
    structure.sigmas[:] = torch.tensor([1.0, 0.3, 0.2, 0.1])
    return structure


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("coordinates", "decoder", "block", "encoder", "discriminator", "whole"),
    [
        (False, 260_931, 188_931, 223_360, 187_009, 1_961_310),
        (True, 264_414, 192_414, 227_392, 190_474, 1_996_140),
    ],
)
def test_parameter_counts(coordinates, decoder, block, encoder, discriminator, whole):
    config = Config(coordinates=coordinates)
    assert count(Decoder(config)) == decoder
    assert count(GeneratorBlock(config)) == block
    assert count(Encoder(config)) == encoder
    assert count(Discriminator(config)) == discriminator
    assert count(BaseGenerator(config, scale_sizes((2160, 4096)))) == whole


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


def test_coordinates_run_from_the_top_to_the_bottom():
    assert vertical_coordinates(1).tolist() == [0.0]
    assert vertical_coordinates(2).tolist() == [-1.0, 1.0]
    for height in (3, 17, 192):
        expected = [-1 + 2 * i / (height - 1) for i in range(height)]
        assert vertical_coordinates(height).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("height", [1, 2, 7])
def test_coordinate_channel_reaches_the_convolution(height):
    conv = VerticalCoordConv2d(2, 1)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[0, 2, 1, 1] = 1
    out = conv(torch.randn(3, 2, height, 5))
    assert torch.equal(out, vertical_coordinates(height).view(1, 1, height, 1).expand(3, 1, height, 5))


@pytest.mark.parametrize(("padding", "outside"), [("zeros", 0.0), ("replicate", -1.0), ("reflect", -0.5)])
def test_coordinates_are_padded_like_features(padding, outside):
    conv = VerticalCoordConv2d(1, 1, padding=padding)
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[0, 1, 0, 1] = 1  # the row above
    assert conv(torch.zeros(1, 1, 5, 4))[0, 0, :, 2].tolist() == [outside, -1.0, -0.5, 0.0, 0.5]


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("coordinates", [True, False])
def test_convolution_keeps_any_size(padding, coordinates):
    conv = VerticalCoordConv2d(2, 4, coordinates=coordinates, padding=padding)
    for size in [(1, 1), (1, 6), (6, 1), (2, 2), (5, 7)]:
        assert conv(torch.zeros(1, 2, *size)).shape == (1, 4, *size)


def concatenated(conv, x):
    """The convolution as CoordConv is usually written: the coordinate is one channel more of the input."""
    n, _, height, width = x.shape
    y = vertical_coordinates(height).to(x).view(1, 1, height, 1).expand(n, 1, height, width)
    x = torch.cat([x, y], 1) if conv.coordinates else x
    mode = {"zeros": "constant"}.get(conv.border, conv.border)
    mode = "replicate" if mode == "reflect" and min(height, width) == 1 else mode
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), conv.weight, conv.bias)


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("size", [(7, 9), (2, 2), (5, 1), (1, 4), (6, 3)])
def test_the_coordinates_share_of_a_convolution_is_added(padding, size):
    """In values and in the gradients of everything, at the borders too."""
    conv = VerticalCoordConv2d(3, 4, padding=padding).double()
    x = torch.randn(2, 3, *size).double().requires_grad_()
    wanted, made = concatenated(conv, x), conv(x)
    torch.testing.assert_close(made, wanted)
    towards = torch.randn_like(wanted)
    sources = (x, conv.weight, conv.bias)
    expected = torch.autograd.grad(wanted, sources, towards)
    for mine, theirs in zip(torch.autograd.grad(made, sources, towards), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(conv.input_gradient(towards, conv.weight), expected[0])


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("coordinates", [True, False])
def test_the_critics_gradient_is_autograds_and_so_is_its_own_gradient(padding, coordinates):
    config = dataclasses.replace(TINY, padding=padding, coordinates=coordinates)
    critic = Discriminator(config).double().eval()  # whose weights stay the same from look to look
    x = torch.randn(2, 3, 9, 7).double().requires_grad_()
    (expected,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    made = critic.input_gradient(x.detach())
    torch.testing.assert_close(made, expected)
    for _, weight in (named for named in critic.named_parameters() if not named[0].endswith("bias")):
        ours, theirs = (
            torch.autograd.grad(((g.norm(dim=1) - 1) ** 2).mean(), weight, retain_graph=True)[0]
            for g in (made, expected)
        )
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_the_critics_gradient_looks_at_each_weight_once():
    """Under spectral normalisation every look goes on with the power iteration, as one pass of the critic does."""
    looked, passed = Discriminator(TINY), Discriminator(TINY)
    passed.load_state_dict(looked.state_dict())
    x = torch.randn(1, 3, 8, 8)
    looked.input_gradient(x)
    passed(x)
    for mine, theirs in zip(looked.buffers(), passed.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_vanilla_convolution_is_torch_convolution():
    conv = VerticalCoordConv2d(3, 4, coordinates=False)
    x = torch.randn(1, 3, 9, 8)
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias, padding=1))


def test_norm_is_batch_norm_of_one_picture():
    norm, reference = SpatialNorm(4), nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(4))
        norm.bias.copy_(torch.randn(4))
        reference.weight.copy_(norm.weight)
        reference.bias.copy_(norm.bias)
    x = torch.randn(2, 4, 5, 6) * 3 + 1
    alone = torch.cat([reference(x[:1]), reference(x[1:])])
    torch.testing.assert_close(norm(x), alone)
    assert norm(torch.ones(1, 4, 1, 1)).flatten().tolist() == norm.bias.tolist()


def test_sample_is_deterministic_and_in_range():
    structure = tiny()
    picture = structure.sample(noise(1))
    assert picture.shape == (3, 24, 32)
    assert picture.dtype == torch.float32
    assert picture.is_contiguous()
    assert not picture.requires_grad
    assert 0 <= picture.min() < picture.max() <= 1
    assert torch.equal(picture, structure.sample(noise(1)))
    assert not torch.equal(picture, structure.sample(noise(2)))


@pytest.mark.parametrize("size", [(24, 32), (24, 80), (50, 33), (7, 5), (1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
def test_any_size(size, padding):
    config = Config(last=3, last_vae=1, channels=6, latent=5, layers=2, padding=padding)
    picture = tiny(config).sample(noise(0), size)
    assert picture.shape == (3, *size)
    assert bool(picture.isfinite().all())


def test_other_sizes_scale_every_inner_size():
    structure = BaseGenerator(Config(), scale_sizes((2160, 4096)))
    assert structure.sizes_for(structure.base_size) == structure.sizes
    wide = structure.sizes_for((135, 512))
    assert wide[0] == (17, 66)
    assert wide[-1] == (135, 512)
    assert structure.sizes_for((1, 1))[0] == (1, 1)
    with pytest.raises(UsageError, match="0x5"):
        structure.sizes_for((5, 0))


def test_noise_enters_above_the_vae_scales_only():
    structure, asked = tiny(), []

    def record(m, shape):
        asked.append((m, shape))
        return torch.zeros(shape)

    structure.sample(record)
    assert asked == [(0, (5, 6, 8)), (2, (3, 15, 21)), (3, (3, 24, 32))]


def test_sample_follows_the_formula():
    structure, draw = tiny(), noise(3)
    picture = torch.tanh(structure.decoder(draw(0, (5, 6, 8))[None]))
    for m, size in list(enumerate(structure.sizes))[1:]:
        up = nn.functional.interpolate(picture, size, mode="bilinear", align_corners=True)
        entry = up + structure.sigmas[m] * draw(m, (3, *size))[None] if m > 1 else up
        picture = torch.tanh(up + structure.blocks[m - 1](entry))
    torch.testing.assert_close(structure.sample(draw), (picture[0].detach() + 1) / 2, atol=1e-5, rtol=0)


def test_sample_can_stop_early():
    assert tiny().sample(noise(0), last=1).shape == (3, *tiny().sizes[1])


def test_file_round_trip_in_half_precision(tmp_path):
    structure, path = tiny(), tmp_path / "s.safetensors"
    structure.to_file(path)
    loaded = BaseGenerator.from_file(path)
    assert list(tmp_path.iterdir()) == [path]
    assert loaded.config == structure.config
    assert loaded.sizes == structure.sizes
    assert loaded.metadata() == structure.metadata()
    assert loaded.metadata()["licence"] == "CC0-1.0"
    assert torch.equal(loaded.sigmas, structure.sigmas)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    for name, tensor in structure.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    assert (loaded.sample(noise(0)) - structure.sample(noise(0))).abs().mean() < 0.01
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == [METADATA_KEY]
        assert "blocks.0.head.conv.weight" in file.keys()  # noqa: SIM118 (not a dict)
        assert file.get_tensor("decoder.tail.weight").dtype == torch.float16


@pytest.mark.parametrize("config", [TINY, Config(last=0, last_vae=0, channels=4, latent=3, layers=1)])
def test_state_round_trip_is_exact(config):
    structure = BaseGenerator(config, scale_sizes((10, 20), config.last, 32, 8))
    metadata = json.loads(json.dumps(structure.metadata()))
    loaded = BaseGenerator.from_state(structure.state(torch.float32), metadata)
    assert torch.equal(loaded.sample(noise(0)), structure.sample(noise(0)))


def changed(state, name, tensor):
    return {**state, name: tensor}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "blocks.1.tail.bias"}, "blocks.1.tail.bias is missing"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("decoder")}, "decoder.head.conv.weight is missing"),
        (lambda s: changed(s, "extra", torch.zeros(1)), "extra is unknown"),
        (lambda s: changed(s, "sigmas", torch.zeros(2)), "sigmas has shape"),
        (lambda s: changed(s, "decoder.tail.weight", torch.zeros(3, 6)), "four dimensions"),
        (lambda s: changed(s, "decoder.tail.weight", torch.zeros(3, 9, 3, 3)), "expected 6 or 7"),
        (lambda s: changed(s, "decoder.tail.bias", torch.full((3,), math.nan)), "decoder.tail.bias holds NaN"),
        (lambda s: changed(s, "decoder.tail.bias", torch.zeros(3, dtype=torch.int32)), "expected a float type"),
    ],
)
def test_damaged_tensors_are_named(damage, message):
    structure = tiny()
    with pytest.raises(ModelError, match=message) as error:
        BaseGenerator.from_state(damage(structure.state()), structure.metadata())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "sr", "kind and architecture"),
        ("architecture", "singan", "kind and architecture"),
        ("M", 4, "M = 4"),
        ("L", 7, "L = 7"),
        ("L", "one", "L = 'one'"),
        ("coordinates", False, "coordinates = False"),
        ("padding", "circular", "padding 'circular'"),
        ("padding", None, "padding = None"),
        ("sizes", [[1, 2]], "'sizes'"),
        ("sizes", [[0, 2]] * 4, "'sizes'"),
        ("sizes", None, "'sizes'"),
    ],
)
def test_wrong_metadata_is_named(key, value, message):
    structure = tiny()
    with pytest.raises(ModelError, match=message):
        BaseGenerator.from_state(structure.state(), {**structure.metadata(), key: value})


def test_unreadable_files(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(ModelError, match="cannot be read"):
        BaseGenerator.from_file(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match="cannot be read"):
        BaseGenerator.from_file(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="not a structure"):
        BaseGenerator.from_file(path)
    save_file({"x": torch.zeros(1)}, path, metadata={METADATA_KEY: "{}"})
    with pytest.raises(ModelError, match=r"s\.safetensors: kind"):
        BaseGenerator.from_file(path)


def test_infinite_weights_are_not_written(tmp_path):
    structure = tiny()
    with torch.no_grad():
        structure.decoder.tail.bias[0] = 1e6  # infinite in half precision
    with pytest.raises(ModelError, match="decoder.tail.bias"):
        structure.to_file(tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_impossible_configurations():
    with pytest.raises(UsageError, match="L = 4"):
        Config(last=3, last_vae=4)
    with pytest.raises(UsageError, match="circular"):
        Config(padding="circular")
    with pytest.raises(UsageError, match="2 sizes for 4 scales"):
        BaseGenerator(TINY, [(1, 1), (2, 2)])


def test_the_committed_structure():
    structure = open_structure(Path(__file__).parents[2] / "models" / "picosdeeuropa.safetensors")
    metadata = structure.metadata()
    assert structure.base_size == (192, 256)
    assert metadata["licence"] == "CC-BY-4.0"
    assert "Aitzol Berasategi" in metadata["source"]
    picture = structure.sample(noise(0))
    top, bottom = picture[:, :48].mean((1, 2)), picture[:, -48:].mean((1, 2))
    assert top[2] > top[0]  # a blue sky
    assert bottom[1] > bottom[2]  # above a green and brown meadow


@pytest.mark.parametrize("padding", ["reflect", "replicate"])
def test_padding_has_the_gradients_of_pytorchs_own_and_keeps_less(padding):
    conv = VerticalCoordConv2d(2, 3, padding=padding).double()
    x = torch.rand(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv, (x,))
    assert torch.autograd.gradgradcheck(conv, (x,))
    kept = []
    conv = VerticalCoordConv2d(8, 8, coordinates=False, padding=padding)
    x = torch.rand(1, 8, 32, 32, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.autocast("cpu"):
        made = conv(x.requires_grad_())
        expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode=padding), conv.weight, conv.bias)
    assert torch.equal(made, expected)
    assert [(t.dtype, tuple(t.shape)) for t in kept[:2]] == [
        (torch.bfloat16, (1, 8, 34, 34)),
        (torch.bfloat16, (8, 8, 3, 3)),
    ]
