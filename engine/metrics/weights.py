"""The trained weights that SIFID and LPIPS are defined with: which files they are, where they are looked for, their loading.

They are downloaded by the user. Every file's name carries the first digits of its sha256, or they are given here, and
are checked: a score with other weights would be no SIFID and no LPIPS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.metrics.inception import InceptionPrefix
from engine.metrics.lpips import AlexFeatures, Lpips
from engine.metrics.sifid import Inception
from engine.model.checkpoints import read_checkpoint

_HUB = "https://download.pytorch.org/models/"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights under the names that it has had, each with the first digits of its sha256, the newest first."""

    names: Mapping[str, str]
    content: str
    origin: str
    package: str | None = None  # a package that carries it, and where
    inside: str = ""

    def find(self, folder: Path | None) -> Path | None:
        """The file in ``folder``, else in PyTorch's hub cache, else in the package; None when it is nowhere."""
        for place in self._places(folder):
            for name in self.names:
                if (place / name).is_file():
                    return place / name
        return None

    def missing(self, folder: Path | None) -> str:
        """What to tell when it is not found: one line."""
        name = next(iter(self.names))
        where = folder or hub_folder()
        return (
            f"{name} is missing ({self.content}): put it into {where} (from {self.origin}), "
            "or name its folder with --weights-dir"
        )

    def load(self, folder: Path | None) -> dict[str, Tensor]:
        """Its tensors. Raises ModelError when it is missing or is another file of that name."""
        path = self.find(folder)
        if path is None:
            raise ModelError(self.missing(folder))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        wanted = self.names[path.name]
        if not digest.startswith(wanted):
            raise ModelError(
                f"{path}: sha256 begins with {digest[: len(wanted)]}, expected {wanted}: not {self.content}; "
                f"fetch it again from {self.origin}"
            )
        return read_checkpoint(path)

    def _places(self, folder: Path | None) -> list[Path]:
        places = [hub_folder()] if folder is None else [folder, hub_folder()]
        spec = util.find_spec(self.package) if self.package else None
        roots = (spec.submodule_search_locations or ()) if spec else ()
        return places + [Path(root) / self.inside for root in roots]


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
    "weights/v0.1 of the lpips package, which is also found where it is installed",
    package="lpips",
    inside="weights/v0.1",
)

NEEDED = {"sifid": (INCEPTION,), "lpips": (ALEXNET, HEADS)}
"""Metric -> its files."""


def hub_folder() -> Path:
    """Where PyTorch keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def missing(metric: str, folder: Path | None) -> list[str]:
    """A line for every file that this metric needs and that is nowhere."""
    return [file.missing(folder) for file in NEEDED[metric] if file.find(folder) is None]


def load_inception(folder: Path | None, device: torch.device | None = None) -> Inception:
    network = InceptionPrefix()
    fill(network, INCEPTION.load(folder), INCEPTION.content)
    return Inception(network, device)


def load_lpips(folder: Path | None, device: torch.device | None = None) -> Lpips:
    network, heads = AlexFeatures(), HEADS.load(folder)
    fill(network, ALEXNET.load(folder), ALEXNET.content)
    return Lpips(network, [heads[f"lin{layer}.model.1.weight"].flatten() for layer in range(5)], device)


def fill(network: nn.Module, state: Mapping[str, Tensor], content: str) -> None:
    """Copy a network's tensors out of a file that may hold more, in float32. Raises ModelError when one is not as expected."""
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    for name, tensor in expected.items():
        found = list(state[name].shape) if name in state else "missing"
        if found != list(tensor.shape):
            raise ModelError(f"{content}: {name} is {found}, expected {list(tensor.shape)}; give the file of that name")
    network.load_state_dict({name: state[name].float() for name in expected}, strict=False)
