"""First weights and trained weights: by name, from a file, with fewer blocks or from scratch.

Knows the community's tensor names through ``engine.archs``, and the metadata of a weights file. Does not know losses or
photographs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import archs
from engine.archs import Trainable, esrgan, swinir
from engine.archs.layers import NOISE_KEY, noise_channels_of, noise_conv
from engine.errors import ModelError, UsageError, option
from engine.io.tensors import write_tensors
from engine.model.build import read_stage
from engine.model.checkpoints import PROVENANCE_KEY
from engine.model.packaged import PACKAGED
from engine.training.run.seed import seeded

SCRATCH = "scratch"
"""Name of the start with random weights."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a network, as far as it differs from its start. Raises UsageError for values out of range."""

    architecture: str | None = None
    """``rrdbnet`` or ``swinir``; None for that of the start, ``rrdbnet`` from scratch."""

    channels: int | None = None
    """Feature maps of the trunk; None for those of the start, the published number from scratch."""

    blocks: int | None = None
    """Blocks of the trunk; None for all of the start, the published number from scratch."""

    noise_channels: int = 0
    """Noise channels to add to a start without any; its output hardly changes."""

    def __post_init__(self) -> None:
        if self.architecture not in (None, "rrdbnet", esrgan.NAME, swinir.NAME):
            raise UsageError(
                f"{option('architecture', self.architecture)}: unknown architecture; choose rrdbnet or swinir"
            )
        for name in ("channels", "blocks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{option(name, value)}: must be at least 1")


@dataclass(frozen=True, slots=True)
class Start:
    """A trainable fp32 network and the origin of its weights."""

    network: Trainable
    name: str
    source: str
    licence: str

    digest: str
    """Identifies the weights."""

    sigma: float = 0.0
    """Input noise in a render, for images in [0, 1]."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    """Metadata that the training of these weights recorded."""


def open_start(name: str, shape: Shape, seed: int, index: int = 0) -> Start:
    """Open first weights.

    Args:
        name: a packaged checkpoint, a checkpoint file, a model file or ``scratch``.
        shape: size of the network, as far as it differs from the start.
        seed: seeds random weights.
        index: stage of a model file, from 0.

    Raises:
        UsageError: the shape contradicts the start.
        ModelError: the weights are missing, damaged or of an unknown architecture.
    """
    if name == SCRATCH:
        with seeded(seed):
            return Start(_from_scratch(shape), SCRATCH, "random weights", "", f"{shape} {seed}")
    if name not in PACKAGED and not Path(name).exists():
        raise ModelError(f"{name}: no such weights; use {', '.join(PACKAGED)}, {SCRATCH}, a checkpoint or a model file")
    state, stage = read_stage(name, index)
    if stage.architecture not in (esrgan.NAME, swinir.NAME):
        raise UsageError(f"{name}: architecture {stage.architecture}; start from an ESRGAN or SwinIR, or {SCRATCH}")
    if shape.architecture is not None and stage.architecture != shape.architecture.replace("rrdbnet", esrgan.NAME):
        raise UsageError(
            f"{name}: architecture {stage.architecture}, not {shape.architecture}; leave {option('architecture')} out"
        )
    if shape.blocks is not None:
        state = _select_blocks(state, stage.architecture, shape.blocks, name)
    if not noise_channels_of(state):
        with seeded(seed):
            state = _with_noise_channels(state, shape.noise_channels)
    network = archs.build(state, name)
    assert isinstance(network, Trainable)  # by its architecture
    _check_width(network, shape, name)
    network.requires_grad_(True)
    facts = stage.training or {}
    return Start(network, name, stage.source, stage.licence, _digest(state), stage.sigma, facts)


def architecture_of(name: str, shape: Shape) -> str:
    """Architecture of a start, ``esrgan`` or ``swinir``, without building its network."""
    if name == SCRATCH:
        return swinir.NAME if shape.architecture == swinir.NAME else esrgan.NAME
    return read_stage(name)[1].architecture


def save(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write weights under the community's tensor names, atomically.

    Args:
        path: file to write.
        state: weights by tensor name.
        facts: metadata, stored as JSON.
        dtype: dtype in the file.

    Raises:
        ModelError: a weight is not finite in ``dtype``.
        InputError: the file cannot be written.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    if bad := next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None):
        raise ModelError(f"{path}: tensor {bad} holds NaN or infinity in {dtype}; store fp32 or train again")
    write_tensors(path, tensors, {"format": "pt", PROVENANCE_KEY: json.dumps(facts, sort_keys=True)})


def _from_scratch(shape: Shape) -> Trainable:
    """SwinIR-M or RRDBNet 64x23 unless the shape differs; a dense block grows by half of its input channels."""
    if shape.architecture == swinir.NAME:
        dim, groups = shape.channels or 180, shape.blocks or 6
        layers = (6,) * groups
        return swinir.SwinIR(dim, layers, layers, hidden=2 * dim, noise_channels=shape.noise_channels)
    channels = shape.channels or 64
    return esrgan.RRDBNet(channels, shape.blocks or 23, max(1, channels // 2), noise_channels=shape.noise_channels)


def _select_blocks(state: Mapping[str, Tensor], architecture: str, blocks: int, name: str) -> dict[str, Tensor]:
    """Evenly spaced blocks of the trunk, including the first and the last, and all tensors outside the trunk."""
    prefix = "body." if architecture == esrgan.NAME else "layers."
    numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith(prefix)})
    if blocks > len(numbers):
        raise UsageError(
            f"{option('blocks', blocks)}: {name} has {len(numbers)}; use at most as many, or {option('start', SCRATCH)}"
        )
    last = len(numbers) - 1
    selected = torch.linspace(0, last, blocks).round().int().tolist() if blocks > 1 else [len(numbers) // 2]
    new_number = {numbers[old]: new for new, old in enumerate(selected)}
    result = {}
    for key, tensor in state.items():
        if not key.startswith(prefix):
            result[key] = tensor
        elif (number := int(key.split(".")[1])) in new_number:
            result[f"{prefix}{new_number[number]}.{key.split('.', 2)[2]}"] = tensor
    return result


def _with_noise_channels(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The state with the weights of ``channels`` noise channels."""
    conv = noise_conv(channels, state["conv_first.weight"].shape[0])
    return state if conv is None else {**state, NOISE_KEY: conv.weight.detach()}


def _check_width(network: Trainable, shape: Shape, name: str) -> None:
    """Refuse another width: unlike blocks, channels cannot be taken out of a trained network."""
    channels = network.conv_first.out_channels
    if shape.channels not in (None, channels):
        raise UsageError(
            f"{option('channels', shape.channels)}: {name} has {channels}; leave it out, or use {option('start', SCRATCH)}"
        )


def _digest(state: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.float().contiguous().numpy().tobytes())
    return sha.hexdigest()
