"""Networks of SIFID and LPIPS with their trained weights.

The digest of every file is checked, because scores from other weights are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import ModelError, option
from engine.metrics.inception import InceptionPrefix
from engine.metrics.lpips import AlexFeatures, Lpips
from engine.metrics.sifid import Inception
from engine.model.checkpoints import read_checkpoint
from engine.model.weight_files import WEIGHTS, WeightFile

FILES = {"sifid": (WEIGHTS["inception"],), "lpips": (WEIGHTS["alexnet"], WEIGHTS["lpips"])}
"""Metric -> its files of weights."""


def missing(metric: str, folder: Path | None) -> list[str]:
    """One line for every missing file of a metric."""
    return [_missing(file, folder) for file in FILES[metric] if file.find(folder) is None]


def load_inception(folder: Path | None, device: torch.device | None = None) -> Inception:
    """Load the network of SIFID. Raises ModelError as ``read_weights``."""
    network, file = InceptionPrefix(), WEIGHTS["inception"]
    fill(network, read_weights(file, folder), file.content)
    return Inception(network, device)


def load_lpips(folder: Path | None, device: torch.device | None = None) -> Lpips:
    """Load the networks of LPIPS. Raises ModelError as ``read_weights``."""
    network, file, heads = AlexFeatures(), WEIGHTS["alexnet"], read_weights(WEIGHTS["lpips"], folder)
    fill(network, read_weights(file, folder), file.content)
    return Lpips(network, [heads[f"lin{layer}.model.1.weight"].flatten() for layer in range(5)], device)


def read_weights(file: WeightFile, folder: Path | None) -> dict[str, Tensor]:
    """Tensors of a weight file.

    Raises:
        ModelError: the file is missing or has another digest.
    """
    path = file.find(folder)
    if path is None:
        raise ModelError(f"{_missing(file, folder)}, or name its folder with {option('weights_dir')}")
    file.check(path)
    return read_checkpoint(path)


def _missing(file: WeightFile, folder: Path | None) -> str:
    return f"{next(iter(file.names))} is missing ({file.content}); {file.advice(folder)}"


def fill(network: nn.Module, state: Mapping[str, Tensor], content: str) -> None:
    """Load a network's tensors, in float32, from a state dict that may hold more.

    Args:
        network: every tensor of it except batch counters must be in ``state``.
        state: tensors by name.
        content: description of the file for messages.

    Raises:
        ModelError: a tensor is missing or has another shape.
    """
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    for name, tensor in expected.items():
        shape = list(state[name].shape) if name in state else "missing"
        if shape != list(tensor.shape):
            raise ModelError(f"{content}: {name} is {shape}, expected {list(tensor.shape)}; use the file of that name")
    network.load_state_dict({name: state[name].float() for name in expected}, strict=False)
