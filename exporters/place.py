"""Places of exports: a file, a folder, or a file and the folder of its tiles; each appears whole or not at all.

``publish`` yields a temporary path. A place that is written in a folder of its own yields one with the name of the export,
where the contents name it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from engine.errors import InputError, option
from engine.io.files import move_folder, part_folder, replacing, sync_file, sync_folder


@dataclass(frozen=True, slots=True)
class FilePlace:
    """One file."""

    out: Path

    def check(self, *, overwrite: bool) -> None:
        """Raise InputError if something is there that must not be replaced."""
        if self.out.is_dir():
            raise InputError(f"{self.out}: is a folder; give the name of a file")
        if self.out.exists() and not overwrite:
            raise _exists(self.out)

    def publish(self) -> AbstractContextManager[Path]:
        """Temporary name of the file, which gets its own name at the end of the block."""
        return replacing(self.out)

    def size(self) -> int:
        """Bytes of the export."""
        return self.out.stat().st_size


@dataclass(frozen=True, slots=True)
class ArchivePlace(FilePlace):
    """One file whose contents name it."""

    @contextmanager
    def publish(self) -> Iterator[Path]:
        with part_folder(self.out) as part:
            yield part / self.out.name
            sync_file(part / self.out.name)
            (part / self.out.name).replace(self.out)
            sync_folder(self.out.parent)


@dataclass(frozen=True, slots=True)
class FolderPlace:
    """A folder that holds a file ``MARK``; a folder without it is somebody else's and is never replaced."""

    out: Path

    MARK = "info.json"

    def check(self, *, overwrite: bool) -> None:
        if os.path.lexists(self.out) and not self.out.is_dir():
            raise InputError(f"{self.out}: is a file; give the name of a folder")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / self.MARK).is_file():
                raise InputError(f"{self.out}: is a folder with other files; choose another name")
            if not overwrite:
                raise _exists(self.out)

    @contextmanager
    def publish(self) -> Iterator[Path]:
        with part_folder(self.out) as part:
            folder = part / self.out.name
            folder.mkdir()
            yield folder
            _synchronise()
            move_folder(folder, self.out)

    def size(self) -> int:
        return _tree_size(self.out)


@dataclass(frozen=True, slots=True)
class DeepZoomPlace:
    """``NAME.dzi`` and, beside it, ``NAME_files``. The file is the export: it appears last, and goes first."""

    out: Path

    SUFFIX: ClassVar[str] = ".dzi"
    FOLDER: ClassVar[str] = "_files"
    """End of the folder's name."""
    FILES: ClassVar[tuple[str, ...]] = ("vips-properties.xml",)
    """Files in the folder, beside the levels."""

    @property
    def tiles(self) -> Path:
        """Folder of the tiles, whose name viewers derive from the file's."""
        return self.out.with_name(f"{stem_of(self.out.name, self.SUFFIX)}{self.FOLDER}")

    def check(self, *, overwrite: bool) -> None:
        FilePlace(self.out).check(overwrite=overwrite)
        if not os.path.lexists(self.tiles):
            return
        if not _holds_tiles(self.tiles, self.FILES):
            raise InputError(f"{self.tiles}: is in the way, with other files than tiles; choose another name")
        if not overwrite:
            raise _exists(self.tiles)

    @contextmanager
    def publish(self) -> Iterator[Path]:
        with part_folder(self.out) as part:
            yield part / self.out.name
            _synchronise()
            self.out.unlink(missing_ok=True)
            move_folder(part / self.tiles.name, self.tiles)
            try:
                (part / self.out.name).replace(self.out)
                sync_folder(self.out.parent)
            except BaseException:
                self.out.unlink(missing_ok=True)
                shutil.rmtree(self.tiles, ignore_errors=True)
                raise

    def size(self) -> int:
        return self.out.stat().st_size + _tree_size(self.tiles)


@dataclass(frozen=True, slots=True)
class PagePlace(DeepZoomPlace):
    """``NAME.html`` and, beside it, ``NAME_page``."""

    SUFFIX: ClassVar[str] = ".html"
    FOLDER: ClassVar[str] = "_page"
    FILES: ClassVar[tuple[str, ...]] = ("app.js", "style.css", "openseadragon-licence.txt")


def stem_of(name: str, suffix: str) -> str:
    """Name of an export without ``suffix`` and that of an archive: viewers of Deep Zoom cut off ``.dzi`` alone."""
    for each in (".zip", suffix):
        if name.lower().endswith(each):
            name = name[: -len(each)]
    return name


Place = FilePlace | FolderPlace | DeepZoomPlace


def _synchronise() -> None:
    """Wait until the contents of thousands of files are on the disk, where the system can: one call, not one a file."""
    if hasattr(os, "sync"):
        os.sync()


def _exists(path: Path) -> InputError:
    return InputError(f"{path}: exists; give {option('overwrite', True)} or choose another name")


def _holds_tiles(folder: Path, files: tuple[str, ...]) -> bool:
    """Whether a folder holds levels of tiles, these files, and nothing of a user."""
    return folder.is_dir() and all(path.name.isdigit() or path.name in files for path in folder.iterdir())


def _tree_size(folder: Path) -> int:
    return sum(os.path.getsize(os.path.join(path, name)) for path, _, names in os.walk(folder) for name in names)
