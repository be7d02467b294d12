"""Trained weights of SIFID and LPIPS: file names, folders, digests and loading.

Users download the files themselves. The digest of every file is checked, because scores from other weights are not comparable
with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import ModelError, option
from engine.io.files import sha256
from engine.metrics.inception import InceptionPrefix
from engine.metrics.lpips import AlexFeatures, Lpips
from engine.metrics.sifid import Inception
from engine.model.checkpoints import read_checkpoint

_HUB = "https://download.pytorch.org/models/"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A published file of weights."""

    names: Mapping[str, str]
    """File name -> first digits of the sha256, newest first."""

    content: str
    """Description for messages."""

    origin: str
    """Address or package to get it from."""

    package: str | None = None
    """Python package that carries the file."""

    inside: str = ""
    """Folder within the package."""

    def find(self, folder: Path | None) -> Path | None:
        """The file in ``folder``, in PyTorch's hub cache or in the package; None if it is in none of them."""
        for place in self._folders(folder):
            for name in self.names:
                if (place / name).is_file():
                    return place / name
        return None

    def missing(self, folder: Path | None) -> str:
        """One line about the missing file and its place."""
        name = next(iter(self.names))
        return f"{name} is missing ({self.content}); download it from {self.origin} into {folder or hub_folder()}"

    def load(self, folder: Path | None) -> dict[str, Tensor]:
        """Tensors of the file.

        Raises:
            ModelError: the file is missing or has another digest.
        """
        path = self.find(folder)
        if path is None:
            raise ModelError(f"{self.missing(folder)}, or name its folder with {option('weights_dir')}")
        digest, expected = sha256(path), self.names[path.name]
        if not digest.startswith(expected):
            raise ModelError(
                f"{path}: sha256 begins with {digest[: len(expected)]}, expected {expected}: not {self.content}; "
                f"download it again from {self.origin}"
            )
        return read_checkpoint(path)

    def _folders(self, folder: Path | None) -> list[Path]:
        folders = [hub_folder()] if folder is None else [folder, hub_folder()]
        spec = util.find_spec(self.package) if self.package else None
        roots = (spec.submodule_search_locations or ()) if spec else ()
        return folders + [Path(root) / self.inside for root in roots]


INCEPTION = WeightFile(
    {"inception_v3_google-0cc3c7bd.pth": "0cc3c7bd", "inception_v3_google-1a9a5a14.pth": "1a9a5a14"},
    "torchvision's Inception-v3 of ImageNet",
    _HUB + "inception_v3_google-0cc3c7bd.pth",
)
ALEXNET = WeightFile(
    {"alexnet-owt-7be5be79.pth": "7be5be79", "alexnet-owt-4df8aa71.pth": "4df8aa71"},
    "torchvision's AlexNet of ImageNet",
    _HUB + "alexnet-owt-7be5be79.pth",
)
HEADS = WeightFile(
    {"alex.pth": "df73285e"},
    "the linear heads of LPIPS 0.1 for AlexNet",
    "weights/v0.1 of the lpips package (found by itself where that is installed)",
    package="lpips",
    inside="weights/v0.1",
)

FILES = {"sifid": (INCEPTION,), "lpips": (ALEXNET, HEADS)}
"""Metric -> its files of weights."""


def hub_folder() -> Path:
    """PyTorch's cache of downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def missing(metric: str, folder: Path | None) -> list[str]:
    """One line for every missing file of a metric."""
    return [file.missing(folder) for file in FILES[metric] if file.find(folder) is None]


def load_inception(folder: Path | None, device: torch.device | None = None) -> Inception:
    """Load the network of SIFID. Raises ModelError as ``WeightFile.load``."""
    network = InceptionPrefix()
    fill(network, INCEPTION.load(folder), INCEPTION.content)
    return Inception(network, device)


def load_lpips(folder: Path | None, device: torch.device | None = None) -> Lpips:
    """Load the networks of LPIPS. Raises ModelError as ``WeightFile.load``."""
    network, heads = AlexFeatures(), HEADS.load(folder)
    fill(network, ALEXNET.load(folder), ALEXNET.content)
    return Lpips(network, [heads[f"lin{layer}.model.1.weight"].flatten() for layer in range(5)], device)


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
