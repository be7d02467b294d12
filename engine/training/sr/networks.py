"""Where a super-resolution run starts and what it leaves: weights by name, by file, shallower or from scratch.

Knows the community's names of tensors through engine.archs, and the facts that a weights file carries in its metadata.
Does not know losses or photographs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import archs
from engine.archs import Upscaler, esrgan, swinir
from engine.archs.layers import NOISE_KEY, noise_channels_of, noise_conv
from engine.errors import ModelError, UsageError
from engine.io.tensors import write_tensors
from engine.model.build import read_stage
from engine.model.checkpoints import PROVENANCE_KEY
from engine.training.run.seed import seeded

SCRATCH = "scratch"


@dataclass(frozen=True, slots=True)
class Shape:
    """A network's size, where it is not the start's own. None: as the start has it, or the architecture's default.

    `noise_channels` are given to a start that has none; it makes nearly the same picture with them.
    """

    architecture: str | None = None
    channels: int | None = None
    blocks: int | None = None
    noise_channels: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in (None, "rrdbnet", esrgan.NAME, swinir.NAME):
            raise UsageError(f"architecture {self.architecture!r} is unknown: choose rrdbnet or swinir")
        for name in ("channels", "blocks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} = {value}: must be at least 1")


@dataclass(frozen=True, slots=True)
class Start:
    """A network that can be trained (fp32), and where its weights came from. ``facts``: what their own training noted."""

    network: Upscaler
    name: str
    source: str
    licence: str
    digest: str
    sigma: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


def open_start(name: str, shape: Shape, seed: int, place: int = 0) -> Start:
    """`name`: a packaged checkpoint, a file, a model bundle (its enlargement at this `place`, from 0), or "scratch".

    Raises:
        UsageError: the shape contradicts the start.
        ModelError: no such weights, or a file that is damaged or of an unknown architecture.
    """
    if name == SCRATCH:
        with seeded(seed):
            return Start(_fresh(shape), SCRATCH, "random weights", "", f"{shape} {seed}")
    state, stage = read_stage(name, place)
    if shape.architecture is not None and stage.architecture != shape.architecture.replace("rrdbnet", esrgan.NAME):
        raise UsageError(f"the start {name} is of architecture {stage.architecture}, not {shape.architecture}")
    if shape.blocks is not None:
        state = _shallower(state, stage.architecture, shape.blocks, name)
    if not noise_channels_of(state):
        with seeded(seed):
            state = _with_noise_channels(state, shape.noise_channels)
    network = archs.build(state, name)
    _check_width(network, shape, name)
    network.requires_grad_(True)
    facts = stage.training or {}
    return Start(network, name, stage.source, stage.licence, _digest(state), stage.sigma, facts)


def architecture_of(name: str, shape: Shape) -> str:
    """What `open_start` would give, "esrgan" or "swinir"."""
    if name == SCRATCH:
        return swinir.NAME if shape.architecture == swinir.NAME else esrgan.NAME
    return read_stage(name)[1].architecture


def save(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write the weights under the community's names, whole or not at all, with `facts` as JSON in the metadata."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    if bad := next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None):
        raise ModelError(
            f"{path}: the trained tensor {bad} holds NaN or infinity in {dtype}: store fp32 or train again"
        )
    write_tensors(path, tensors, {"format": "pt", PROVENANCE_KEY: json.dumps(facts, sort_keys=True)})


def _fresh(shape: Shape) -> Upscaler:
    """SwinIR-M or RRDBNet 64x23, or what the shape says; half as many channels grow in a dense block as come in."""
    if shape.architecture == swinir.NAME:
        dim, groups = shape.channels or 180, shape.blocks or 6
        layers = (6,) * groups
        return swinir.SwinIR(dim, layers, layers, hidden=2 * dim, noise_channels=shape.noise_channels)
    channels = shape.channels or 64
    return esrgan.RRDBNet(channels, shape.blocks or 23, max(1, channels // 2), noise_channels=shape.noise_channels)


def _shallower(state: Mapping[str, Tensor], architecture: str, blocks: int, name: str) -> dict[str, Tensor]:
    """Evenly spaced blocks of the trunk, the first and the last among them, and everything around the trunk."""
    prefix = "body." if architecture == esrgan.NAME else "layers."
    numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith(prefix)})
    if blocks > len(numbers):
        raise UsageError(f"blocks = {blocks}: the start {name} has {len(numbers)}; take at most as many, or scratch")
    kept = torch.linspace(0, len(numbers) - 1, blocks).round().int().tolist() if blocks > 1 else [len(numbers) // 2]
    place = {numbers[old]: new for new, old in enumerate(kept)}
    result = {}
    for key, tensor in state.items():
        if not key.startswith(prefix):
            result[key] = tensor
        elif (number := int(key.split(".")[1])) in place:
            result[f"{prefix}{place[number]}.{key.split('.', 2)[2]}"] = tensor
    return result


def _with_noise_channels(state: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The state with so many of them."""
    conv = noise_conv(channels, state["conv_first.weight"].shape[0])
    return state if conv is None else {**state, NOISE_KEY: conv.weight.detach()}


def _check_width(network: Upscaler, shape: Shape, name: str) -> None:
    """Channels cannot be taken from a trained network as blocks can."""
    found = network.conv_first.out_channels
    if shape.channels not in (None, found):
        raise UsageError(
            f"channels = {shape.channels}: the start {name} has {found}; leave it out, or start from scratch"
        )


def _digest(state: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.float().contiguous().numpy().tobytes())
    return sha.hexdigest()
