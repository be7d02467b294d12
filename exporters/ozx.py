"""Single-file OME-Zarr (``.ozx``, RFC 9 of OME-NGFF): the store itself, in a ZIP archive without compression.

Files of the store are copied byte for byte, so nothing is decoded, and the time is that of a copy. The order and the
comment are those of the RFC's recommended variant: every zarr.json first, breadth first, and ZIP64.
https://ngff.openmicroscopy.org/rfc/9/
"""

from __future__ import annotations

import copy
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.causes import naming
from engine.errors import InputError, UsageError, option
from engine.exporters.job import Progress, parse_options
from engine.exporters.tiles import new_archive
from engine.exporters.view import View

_ROOT = "zarr.json"

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every entry: the same store gives the same bytes."""

_JSON_FIRST = {"centralDirectory": {"jsonFirst": True}}

_PIECE = 1 << 20
"""Bytes that are copied at once."""

_ENTRY_BYTES = 300
"""Bytes of a file's two headers in the archive, with its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OzxOptions:
    """The format has no options."""


@dataclass(frozen=True, slots=True)
class OzxJob:
    """A checked export to one .ozx file."""

    view: View
    files: tuple[tuple[str, int], ...]
    """Name in the archive and bytes of every file of the store but zarr.json, in order."""
    metadata: tuple[tuple[str, bytes], ...]
    """Name and contents of every zarr.json, breadth first."""
    version: str
    """Version of OME-Zarr."""
    notes: tuple[str, ...] = ()

    @property
    def estimate(self) -> int:
        sizes = [size for _, size in self.files] + [len(data) for _, data in self.metadata]
        return sum(sizes) + _ENTRY_BYTES * len(sizes)

    def write(self, path: Path, on_progress: Progress) -> None:
        """Copy the store's files."""
        total, done = sum(size for _, size in self.files), 0
        with new_archive(path) as archive:
            # ASCII, and a description of the order above: readers need no other entry of the directory.
            archive.comment = json.dumps({"ome": {"version": self.version, "zipFile": _JSON_FIRST}}).encode()
            for name, data in self.metadata:
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
            for name, size in self.files:
                done += self._copy(archive, name, size)
                on_progress(done, total)
                self.view.check_unchanged()

    def _copy(self, archive: zipfile.ZipFile, name: str, size: int) -> int:
        """Append one file of the store, which must still have its size: shards are replaced whole."""
        path, copied = self.view.store / name, 0
        entry = zipfile.ZipInfo(name, _EPOCH)
        entry.file_size = size
        try:
            with (
                naming(path),
                path.open("rb") as source,
                archive.open(entry, "w", force_zip64=size >= 1 << 31) as target,
            ):
                while piece := source.read(_PIECE):
                    target.write(piece)
                    copied += len(piece)
        except FileNotFoundError as error:
            self.view.check_unchanged()
            raise InputError(f"{path}: missing shard; run engine check {self.view.store} --repair") from error
        if copied != size:
            self.view.check_unchanged()
            raise InputError(
                f"{path}: changed while it was read ({size} bytes before, {copied} now); repeat this command"
            )
        return copied


def prepare(view: View, suffix: str, values: Mapping[str, Any]) -> OzxJob:
    """List the store's files. Nothing is written yet.

    Raises:
        UsageError: an option, or a region or depth, which would make other files than the store's.
        InputError: the store is no OME-Zarr 0.5, which the format demands.
    """
    checked_options(suffix, values)
    stored = {(level.path, level.bounds) for level in view.pyramid.levels}
    if view.pixels != view.pyramid.pixels or (view.levels[0].path, view.levels[0].bounds) not in stored:
        raise UsageError(
            f"{option('roi')}, {option('size')} and {option('depth')}: do not apply to .ozx, which holds the store's own "
            f"files; leave them out, or give {option('level')}"
        )
    root = _read_root(view.store)
    paths = [level.path for level in view.levels]
    root_text = json.dumps(_from_level(root, paths), indent=2).encode()
    metadata = [(_ROOT, root_text), *((f"{path}/{_ROOT}", _read(view.store / path / _ROOT)) for path in paths)]
    files = [file for path in paths for file in _files(view.store, path)]
    return OzxJob(view, tuple(files), tuple(metadata), str(root["attributes"]["ome"].get("version", "0.5")))


def checked_options(suffix: str, values: Mapping[str, Any]) -> OzxOptions:
    """The format has no options. Raises UsageError if there are any."""
    return parse_options(OzxOptions, values, suffix)


def check_size(suffix: str, width: int, height: int) -> None:
    """Accept any size: the archive may exceed 4 GiB."""


def _read(path: Path) -> bytes:
    with naming(path):
        return path.read_bytes()


def _read_root(store: Path) -> dict[str, Any]:
    """Metadata of the store's group."""
    path = store / _ROOT
    if not path.is_file():
        raise InputError(f"{store}: an OME-Zarr of Zarr 2; .ozx holds OME-Zarr 0.5, export a .tif")
    root: dict[str, Any] = json.loads(_read(path))
    if "ome" not in root.get("attributes", {}):
        raise InputError(f"{store}: OME-Zarr before 0.5; .ozx holds OME-Zarr 0.5, export a .tif")
    return root


def _from_level(root: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """Metadata of a group that holds these levels alone."""
    root = copy.deepcopy(root)
    root.pop("consolidated_metadata", None)
    image = root["attributes"]["ome"]["multiscales"][0]
    image["datasets"] = [dataset for dataset in image["datasets"] if dataset["path"] in paths]
    return root


def _files(store: Path, level: str) -> Iterator[tuple[str, int]]:
    """Names, relative to the store, and bytes of the shards of a level, in the order of their coordinates."""

    def order(entry: os.DirEntry[str]) -> tuple[int, str]:
        return (int(entry.name) if entry.name.isdigit() else -1), entry.name

    def walk(folder: Path) -> Iterator[tuple[str, int]]:
        with naming(folder), os.scandir(folder) as entries:
            listed = sorted(entries, key=order)
        for entry in listed:
            if entry.is_dir():
                yield from walk(folder / entry.name)
            elif entry.name != _ROOT and not entry.name.endswith((".partial", ".part")):
                yield (folder / entry.name).relative_to(store).as_posix(), entry.stat().st_size

    yield from walk(store / level)
