"""RRDBNets in ncnn's format: a graph (.param) and a file of weights without names (.bin).

Weights get their names from the order of an RRDBNet's convolutions, so no other network can be read. Graphs of other
networks that are in use are named by the kinds of their layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.archs import refusal
from engine.archs.esrgan import RRDBNet
from engine.archs.layers import MAX_BLOCKS, MAX_CHANNELS
from engine.errors import ModelError

MAGIC = "7767517"
"""First line of every graph."""

HALF = 0x01306B47
"""Flag in front of fp16 weights; fp32 weights have the flag 0."""

LAYERS = {"Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "ReLU", "Convolution"}
"""Layers of an exported RRDBNet. Only convolutions hold weights, so no other layer shifts the bytes."""

OTHER_NETWORKS = (
    ("Compact (SRVGG, as in realesr-animevideov3)", {"PReLU", "PixelShuffle"}, "realesrgan-ncnn-vulkan"),
    ("waifu2x CUNet", {"Deconvolution", "Pooling", "Scale"}, "waifu2x-ncnn-vulkan"),
    ("RealCUGAN", {"Deconvolution", "Pooling", "InnerProduct"}, "realcugan-ncnn-vulkan"),
    ("waifu2x UpConv7", {"Deconvolution"}, "waifu2x-ncnn-vulkan"),
)
"""Other networks: name, kinds of layers that its graph has and no later one has all of, and program that runs it."""

ATTRIBUTES = {"kernel": ("1", 0), "dilation": ("2", 1), "stride": ("3", 1), "padding": ("4", 0), "bias": ("5", 0)}
"""Attributes of a convolution: the number that ncnn gives each, and its default where the graph leaves it out."""

REQUIRED = {"kernel": 3, "dilation": 1, "stride": 1, "padding": 1, "bias": 1}
"""Values that an RRDBNet's convolutions have."""


GRAPH_LIMIT = 8 << 20
"""Bytes of a graph. That of 23 blocks has 60,000."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution as the graph describes it."""

    name: str
    """Name in the graph."""
    outputs: int
    """Output channels."""
    weights: int
    """Number of weights, without the bias."""


def read_ncnn(path: Path) -> dict[str, Tensor]:
    """Tensors of an RRDBNet under our names, in the stored dtype.

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
        shapes = _rrdbnet_shapes(_parse_graph(graph.read_bytes().decode("ascii", errors="replace")))
    except ModelError as error:
        raise ModelError(f"{graph}: {error}") from error
    try:
        _check_size(data.stat().st_size, shapes)
        return _parse_weights(data.read_bytes(), shapes)
    except ValueError as error:
        raise ModelError(f"{data}: {error}") from error


def _parse_graph(text: str) -> list[Convolution]:
    """Convolutions of a graph: a magic number, the numbers of layers and blobs, and one line per layer."""
    head, *lines = text.splitlines() or [""]
    if head.strip() != MAGIC:
        raise ModelError(f"begins with {head[:16]!r}, not with ncnn's magic number {MAGIC}")
    layers = [line.split() for line in lines[1:] if line.strip()]
    kinds = Counter(layer[0] for layer in layers)
    if alien := next((kind for kind in kinds if kind not in LAYERS), None):
        raise ModelError(_refusal(kinds, alien))
    try:
        announced = int(lines[0].split()[0])
        convolutions = [_parse_convolution(layer) for layer in layers if layer[0] == "Convolution"]
    except (IndexError, KeyError, ValueError) as error:
        raise ModelError(f"damaged graph ({error})") from error
    if announced != len(layers):
        raise ModelError(f"has {len(layers)} layers, but its head announces {announced}; fetch it again")
    upsamplings = kinds["Interp"]
    if upsamplings != 2 and len(convolutions) > 15 and (len(convolutions) - 4 - upsamplings) % 15 == 0:
        raise ModelError(refusal(f"ESRGAN x{2**upsamplings}", "open it with chaiNNer"))
    return convolutions


def _refusal(kinds: Mapping[str, int], alien: str) -> str:
    """Message about a graph with a kind of layer that an RRDBNet has not."""
    for name, layers, program in OTHER_NETWORKS:
        if layers <= kinds.keys():
            return refusal(name, f"open it with {program}")
    return refusal(f"a graph with a layer {alien}", "name an ncnn file of ESRGAN x4")


def _parse_convolution(layer: Sequence[str]) -> Convolution:
    """Parse ``Convolution name inputs outputs input... output... number=value...``."""
    values = dict(item.split("=", 1) for item in layer[4 + int(layer[2]) + int(layer[3]) :])
    attributes = {name: int(values.get(number, default)) for name, (number, default) in ATTRIBUTES.items()}
    if wrong := [f"{name} {value}" for name, value in attributes.items() if value != REQUIRED[name]]:
        raise ModelError(f"{layer[1]} has {', '.join(wrong)}; an RRDBNet has padded 3 x 3 convolutions with a bias")
    return Convolution(layer[1], outputs=int(values["0"]), weights=int(values["6"]))


def _rrdbnet_shapes(convolutions: Sequence[Convolution]) -> dict[str, torch.Size]:
    """Shapes of an RRDBNet's weights by name. The graph has the order in which our module creates convolutions."""
    blocks, rest = divmod(len(convolutions) - 6, 15)
    if not 1 <= blocks <= MAX_BLOCKS or rest:
        raise ModelError(
            f"a graph of {len(convolutions)} convolutions is no RRDBNet, which has 15 per block and 6 more"
        )
    channels, growth = convolutions[0].outputs, convolutions[1].outputs
    if not (0 < channels <= MAX_CHANNELS and 0 < growth <= MAX_CHANNELS):
        raise ModelError(f"a graph of {channels} and {growth} channels is no RRDBNet, which has 64 and 32")
    with torch.device("meta"):
        weights = RRDBNet(channels, blocks, growth).state_dict()
    shapes = {name: weight.shape for name, weight in weights.items() if name.endswith("weight")}
    for (name, shape), convolution in zip(shapes.items(), convolutions, strict=True):
        if (shape[0], shape.numel()) != (convolution.outputs, convolution.weights):
            raise ModelError(
                f"{convolution.name} has {convolution.outputs} channels and {convolution.weights} weights, but {name} "
                f"of an RRDBNet has {shape[0]} and {shape.numel()}"
            )
    return shapes


def _check_size(size: int, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError for more bytes than weights in fp32 take, before they are read; ``_parse_weights`` checks the rest."""
    largest = sum(4 + 4 * shape.numel() + 4 * shape[0] for shape in shapes.values())
    if size > largest:
        raise ValueError(f"holds {size} bytes, but its graph accounts for at most {largest}")


def _parse_weights(content: bytes, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Per convolution: a flag of four bytes, the weights padded to a multiple of four bytes, the bias in fp32.

    Raises ValueError when the content does not fit the shapes.
    """
    state: dict[str, Tensor] = {}
    start = 0
    for name, shape in shapes.items():
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
