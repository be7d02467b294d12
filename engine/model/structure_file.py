"""Files of step 1: one safetensors file with the generator's tensors and, in its metadata, a JSON manifest.

A model bundle holds the same tensors under a prefix and the same manifest inside its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.archs.hpvaegan import BaseGenerator, Config, Padding, Size
from engine.archs.layers import MAX_BLOCKS, MAX_CHANNELS, check_count
from engine.causes import raise_if_exhausted
from engine.errors import ModelError, UsageError
from engine.io.tensors import open_tensors, write_tensors
from engine.model.checkpoints import read_checkpoint
from engine.model.limits import parse_json

METADATA_KEY = "manifest"
"""Key of the JSON manifest in the file's metadata."""

MAX_SIDE, MAX_PIXELS = 1 << 16, 1 << 20
"""Side and area of the image of a scale; training makes 256 pixels a side."""

_KIND = ("structure", "hpvaegan")
_KEYS = ("kind", "architecture", "M", "L", "coordinates", "padding", "sizes")


def write_structure(generator: BaseGenerator, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the file, whole or not at all.

    Raises:
        ModelError: a weight that is NaN or infinite in ``dtype``.
        InputError: a place that cannot be written.
    """
    manifest = json.dumps(structure_metadata(generator), sort_keys=True)
    write_tensors(path, structure_state(generator, dtype), {METADATA_KEY: manifest})


def read_structure(path: Path) -> BaseGenerator:
    """The generator in a file that ``write_structure`` wrote, in float32. Raises ModelError."""
    try:
        with open_tensors(path) as file:
            metadata = parse_json((file.metadata() or {}).get(METADATA_KEY, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise_if_exhausted(error)
        raise ModelError(f"{path}: cannot be read as a safetensors file ({error}); train or fetch it again") from None
    if not isinstance(metadata, dict):
        raise ModelError(f"{path}: not a file of step 1 (no {METADATA_KEY!r} in its metadata); name another file")
    try:
        return structure_from_state(read_checkpoint(path), metadata)
    except ModelError as error:
        raise ModelError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def structure_metadata(generator: BaseGenerator) -> dict[str, Any]:
    """The manifest: the generator's provenance, and the configuration that its tensors do not tell; JSON values."""
    config = generator.config
    return {
        **generator.provenance,
        "kind": _KIND[0],
        "architecture": _KIND[1],
        "M": config.last,
        "L": config.last_vae,
        "coordinates": config.coordinates,
        "padding": config.padding,
        "sizes": [list(size) for size in generator.sizes],
    }


def structure_state(generator: BaseGenerator, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of a file: contiguous, on the host, in ``dtype``; the noise amplitudes stay float32.

    Raises ModelError for a weight that is NaN or infinite in ``dtype``.
    """
    state = {
        name: tensor.detach().to("cpu", torch.float32 if name == "sigmas" else dtype).contiguous()
        for name, tensor in generator.state_dict().items()
    }
    _check_finite(state)
    return state


def structure_from_state(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> BaseGenerator:
    """The generator of these tensors (any float dtype; float32 afterwards) and this manifest, frozen.

    Raises ModelError for tensors or a manifest that are incomplete, damaged or contradict each other.
    """
    config = _config(state, metadata)
    provenance = {key: value for key, value in metadata.items() if key not in _KEYS}
    with torch.device("meta"):
        generator = BaseGenerator(config, _sizes(metadata, config), provenance)
    _check_state(state, generator.state_dict())
    generator.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return generator.requires_grad_(False)


def _config(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Config:
    """Channels, layers and coordinates from the tensors' shapes; L and the padding from the manifest, which repeats M."""
    kind = (metadata.get("kind"), metadata.get("architecture"))
    if kind != _KIND:
        raise ModelError(f"kind and architecture are {kind}, expected {_KIND}")
    head, tail = (_conv_shape(state, f"decoder.{name}.weight") for name in ("head.conv", "tail"))
    coordinates = tail[1] - head[0]
    if coordinates not in (0, 1):
        raise ModelError(f"decoder.tail.weight takes {tail[1]} channels, expected {head[0]} or {head[0] + 1}")
    last, layers = _count(state, r"blocks\.(\d+)\."), _count(state, r"decoder\.body\.(\d+)\.")
    check_count(1 + last, MAX_BLOCKS, "scales")
    check_count(1 + layers, MAX_BLOCKS, "layers of a block")
    check_count(head[0], MAX_CHANNELS, "channels")
    if (1 + last) * layers > len(state):
        raise ModelError(
            f"{1 + last} scales of {layers} layers, but only {len(state)} tensors; fetch or train it again"
        )
    for key, value in {"M": last, "coordinates": bool(coordinates)}.items():
        if metadata.get(key) != value:
            raise ModelError(f"metadata says {key} = {metadata.get(key)!r}, the tensors say {value!r}")
    last_vae, padding = metadata.get("L"), metadata.get("padding")
    if type(last_vae) is not int or not isinstance(padding, str):
        raise ModelError(f"metadata says L = {last_vae!r} and padding = {padding!r}, expected a number and a name")
    try:
        return Config(
            last=last,
            last_vae=last_vae,
            coordinates=bool(coordinates),
            padding=cast(Padding, padding),
            channels=head[0],
            latent=head[1] - coordinates,
            layers=layers,
        )
    except UsageError as error:
        raise ModelError(str(error)) from None


def _conv_shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise ModelError(f"tensor {name} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != 4:
        raise ModelError(f"tensor {name} has shape {shape}, expected four dimensions")
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of modules numbered by ``pattern``, bounded by the number of names; a gap shows up as a missing tensor."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _sizes(metadata: Mapping[str, Any], config: Config) -> tuple[Size, ...]:
    sizes = metadata.get("sizes")
    valid = (
        isinstance(sizes, list)
        and len(sizes) == config.last + 1
        and all(isinstance(s, list) and len(s) == 2 and all(type(v) is int and v > 0 for v in s) for s in sizes)
    )
    if not valid:
        raise ModelError(f"metadata 'sizes' is {sizes!r}, expected {config.last + 1} pairs [height, width]")
    pairs = cast(list[list[int]], sizes)
    for h, w in pairs:
        if max(h, w) > MAX_SIDE or h * w > MAX_PIXELS:
            raise ModelError(f"metadata 'sizes' holds {w:.6g}x{h:.6g}; at most {MAX_PIXELS} pixels are drawn")
    return tuple((h, w) for h, w in pairs)


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if missing := sorted(expected.keys() - state.keys()):
        raise ModelError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ModelError(f"tensor {unknown[0]} is unknown ({len(unknown)} in all)")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        if not tensor.is_floating_point():
            raise ModelError(f"tensor {name} has type {tensor.dtype}, expected a float type")
    _check_finite(state)


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"tensor {name} holds NaN or infinity")
