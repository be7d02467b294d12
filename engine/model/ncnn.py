"""ESRGAN, Compact, SPAN and Real-CUGAN in ncnn's format: a graph (.param) and a file of weights without names (.bin).

Weights get their names from the order of a network's layers, so no other network can be read. Graphs of other networks that
are in use are named by the kinds of their layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from engine.archs import refusal
from engine.archs.compact import Compact
from engine.archs.esrgan import RRDBNet
from engine.archs.layers import MAX_BLOCKS, MAX_CHANNELS, check_image_channels, shuffle_factor
from engine.errors import ModelError, option
from engine.model import ncnn_cugan, ncnn_span
from engine.model.ncnn_layers import Layer

MAGIC = "7767517"
"""First line of every graph."""

HALF = 0x01306B47
"""Flag in front of fp16 weights; fp32 weights have the flag 0."""

LAYERS = {
    *("Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "ReLU", "Convolution"),
    *("PReLU", "PixelShuffle"),  # of Compact alone
}
"""Layers of the networks that are read. Only convolutions and PReLUs hold weights, so no other layer shifts the bytes."""

_FORMS = (ncnn_cugan, ncnn_span)
"""Modules for networks with kinds of layers of their own."""

_READ = "ESRGAN, Compact, SPAN or Real-CUGAN"

OTHER_NETWORKS = (
    ("waifu2x CUNet", {"Deconvolution", "Pooling", "Scale"}, "waifu2x-ncnn-vulkan"),
    ("waifu2x UpConv7", {"Deconvolution"}, "waifu2x-ncnn-vulkan"),
)
"""Other networks: name, kinds of layers that its graph has and no later one has all of, and program that runs it."""

GRAPH_LIMIT = 8 << 20
"""Bytes of a graph. That of 23 blocks has 60,000."""


def read_ncnn(path: Path) -> dict[str, Tensor]:
    """Tensors of an ESRGAN, a Compact or a SPAN under our names, or of a Real-CUGAN under its own, in the stored dtype.

    Args:
        path: either file of the pair.

    Raises:
        ModelError: half of the pair is missing, is damaged, or holds another network.
        OSError: a file cannot be read.
    """
    graph, data = path.with_suffix(".param"), path.with_suffix(".bin")
    for part in (graph, data):
        if not part.is_file():
            raise ModelError(f"{path}: an ncnn model is a pair of files, but there is no {part.name} beside it")
    if graph.stat().st_size > GRAPH_LIMIT:
        raise ModelError(f"{graph}: a graph of {graph.stat().st_size} bytes; graphs of at most {GRAPH_LIMIT} are read")
    try:
        layers = _parse_graph(graph.read_bytes().decode("ascii", errors="replace"))
        form = _form({layer.kind for layer in layers})
        shapes, slopes = _shapes(layers) if form is None else (form.shapes(layers), {})
    except ModelError as error:
        raise ModelError(f"{graph}: {error}") from error
    except (IndexError, KeyError, ValueError) as error:
        raise ModelError(f"{graph}: damaged graph ({error})") from error
    try:
        _check_size(data.stat().st_size, shapes)
        state = {**_parse_weights(data.read_bytes(), shapes), **slopes}
        return state if form is None else form.canonical(state, layers)
    except (ValueError, ModelError) as error:
        raise ModelError(f"{data}: {error}") from error


def _form(kinds: Set[str]) -> ModuleType | None:
    """The module that reads a graph with these kinds of layers; None for this one."""
    return next((form for form in _FORMS if kinds >= form.KINDS), None)


def _parse_graph(text: str) -> list[Layer]:
    """Layers of a graph: a magic number, the numbers of layers and blobs, and one line per layer.

    Raises ModelError for another network, IndexError or ValueError for a damaged graph.
    """
    head, *lines = text.splitlines() or [""]
    if head.strip() != MAGIC:
        raise ModelError(f"begins with {head[:16]!r}, not with ncnn's magic number {MAGIC}")
    layers = [line.split() for line in lines[1:] if line.strip()]
    kinds = Counter(layer[0] for layer in layers)
    form = _form(kinds.keys())
    known = LAYERS if form is None else form.LAYERS
    if alien := next((kind for kind in kinds if kind not in known), None):
        raise ModelError(_refusal(kinds, alien))
    announced = int(lines[0].split()[0])
    result = [_parse_layer(layer) for layer in layers]
    for layer in result:
        if form is None and layer.kind == "Convolution":
            layer.check_convolution(3)
    if announced != len(layers):
        raise ModelError(f"has {len(layers)} layers, but its head announces {announced}; fetch it again")
    return result


def _refusal(kinds: Mapping[str, int], alien: str) -> str:
    """Message about a graph with a kind of layer that no network here has."""
    for name, layers, program in OTHER_NETWORKS:
        if layers <= kinds.keys():
            return refusal(name, f"open it with {program}")
    return refusal(f"a graph with a layer {alien}", f"name an ncnn file of {_READ}")


def _parse_layer(words: Sequence[str]) -> Layer:
    """Parse ``Kind name inputs outputs input... output... number=value...``."""
    return Layer(words[0], words[1], dict(item.split("=", 1) for item in words[4 + int(words[2]) + int(words[3]) :]))


def _shapes(layers: Sequence[Layer]) -> tuple[dict[str, torch.Size], dict[str, Tensor]]:
    """Shapes of a network's weights by name, in the order of the file, and slopes that the graph itself states.

    Raises ModelError, or KeyError, IndexError or ValueError for a damaged graph.
    """
    reduced = [layer for layer in layers if layer.kind == "Interp" and 0 < layer.value(1) < 1]
    if reduced:
        factor = reduced[0].value(1)
        raise ModelError(
            f"{reduced[0].name} reduces the result to {factor:g}; name the larger file, and give the size by {option('scale')}"
        )
    kinds = {layer.kind for layer in layers}
    is_compact = not kinds.isdisjoint({"PReLU", "PixelShuffle"})
    convolutions = [layer for layer in layers if layer.kind == "Convolution"]
    if not convolutions:
        raise ModelError(refusal("a graph without convolutions", f"name an ncnn file of {_READ}"))
    if any(not 0 < layer.outputs <= MAX_CHANNELS for layer in convolutions):
        raise ModelError(
            f"a graph of {[layer.outputs for layer in convolutions[:2]]} channels; up to {MAX_CHANNELS} are read"
        )
    first = convolutions[0]
    image_channels = check_image_channels(first.weights // (9 * first.outputs))
    if is_compact:
        return _compact_shapes(layers, image_channels)
    return _rrdbnet_shapes(convolutions, sum(layer.kind == "Interp" for layer in layers), image_channels), {}


def _rrdbnet_shapes(convolutions: Sequence[Layer], upsamplings: int, image_channels: int) -> dict[str, torch.Size]:
    """Shapes of an RRDBNet's weights. The graph has the order in which our module creates convolutions."""
    blocks, rest = divmod(len(convolutions) - 4 - upsamplings, 15)
    if not 1 <= blocks <= MAX_BLOCKS or rest or upsamplings > 4:
        raise ModelError(
            f"a graph of {len(convolutions)} convolutions and {upsamplings} upsamplings is no RRDBNet, which has 15 per block, "
            "one per upsampling and 4 more"
        )
    channels, growth = convolutions[0].outputs, convolutions[1].outputs
    with torch.device("meta"):
        network = RRDBNet(channels, blocks, growth, 2**upsamplings, image_channels=image_channels)
    return _checked(_weights_of(network), convolutions)


def _compact_shapes(layers: Sequence[Layer], image_channels: int) -> tuple[dict[str, torch.Size], dict[str, Tensor]]:
    """Shapes of a Compact's weights, and the slopes of ReLUs."""
    body = [layer for layer in layers if layer.kind in ("Convolution", "PReLU", "ReLU")]
    convs = len(body) // 2 - 1
    if (
        len(body) % 2 == 0
        or convs < 0
        or any((body[i].kind == "Convolution") != (i % 2 == 0) for i in range(len(body)))
    ):
        raise ModelError("a graph of convolutions that do not alternate with activations is no Compact")
    if convs >= MAX_BLOCKS:
        raise ModelError(f"a graph of {convs + 2} convolutions; networks of up to {MAX_BLOCKS} are read")
    channels, scale = body[0].outputs, shuffle_factor(body[-1].outputs, image_channels)
    shuffles = [int(layer.value(0)) for layer in layers if layer.kind == "PixelShuffle"]
    if shuffles != [scale] and (shuffles or scale != 1):
        raise ModelError(f"a graph with shuffles by {shuffles} is no Compact x{scale}, which has one")
    with torch.device("meta"):
        shapes = _weights_of(Compact(channels, convs, scale, image_channels))
    stated = {f"body.{i}.weight": layer.value(0) for i, layer in enumerate(body) if layer.kind == "ReLU"}
    slopes = {name: torch.full((channels,), slope) for name, slope in stated.items()}
    stored = {name: shape for name, shape in shapes.items() if name not in slopes}
    return _checked(stored, [layer for layer in body if layer.kind != "ReLU"]), slopes


def _weights_of(network: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in network.state_dict().items() if name.endswith("weight")}


def _checked(shapes: dict[str, torch.Size], layers: Sequence[Layer]) -> dict[str, torch.Size]:
    """The shapes; ModelError unless the layers of the graph have them."""
    for (name, shape), layer in zip(shapes.items(), layers, strict=True):
        if (shape[0], shape.numel()) != (layer.outputs, layer.weights):
            raise ModelError(
                f"{layer.name} has {layer.outputs} channels and {layer.weights} weights, but {name} has {shape[0]} and "
                f"{shape.numel()}"
            )
    return shapes


def _check_size(size: int, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError for more bytes than weights in fp32 take, before they are read; ``_parse_weights`` checks the rest."""
    largest = sum(4 + 4 * shape.numel() + 4 * shape[0] for shape in shapes.values())
    if size > largest:
        raise ValueError(f"holds {size} bytes, but its graph accounts for at most {largest}")


def _parse_weights(content: bytes, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Values of all layers, one after another.

    A convolution has a flag of four bytes, the weights padded to a multiple of four bytes, and the bias in fp32; a PReLU has
    its slopes in fp32. Raises ValueError when the content does not fit the shapes.
    """
    state: dict[str, Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            state[name], start = _parse_values(content, start, shape[0], torch.float32, name)
            continue
        flag = int.from_bytes(content[start : start + 4], "little")
        if flag not in (0, HALF):
            raise ValueError(
                f"{name} has the flag {flag:#010x} at byte {start}; only fp32 and fp16 weights can be read"
            )
        dtype = torch.float16 if flag == HALF else torch.float32
        weight, start = _parse_values(content, start + 4, shape.numel(), dtype, name)
        state[name] = weight.view(shape)
        bias = name.removesuffix("weight") + "bias"
        state[bias], start = _parse_values(content, start, shape[0], torch.float32, bias)
    if start != len(content):
        raise ValueError(f"holds {len(content)} bytes, but its graph accounts for {start}")
    return state


def _parse_values(content: bytes, start: int, count: int, dtype: torch.dtype, name: str) -> tuple[Tensor, int]:
    """Copied values, and the offset of the next ones."""
    end = start + count * dtype.itemsize
    if end > len(content):
        raise ValueError(f"cut off at byte {len(content)}, in {name}, which ends at byte {end}")
    values = torch.frombuffer(bytearray(content[start:end]), dtype=dtype)
    return values, end + -end % 4
