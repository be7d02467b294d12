"""Files that appear whole or not at all, under temporary names that are nobody else's; locks, and digests.

A temporary name is ``.NAME.<32 hexadecimal digits>.KIND`` beside NAME. Its writer holds a lock on it, which ends with the
process. So a name of this form without a lock is a leftover, and only such names are ever removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from engine.causes import naming

try:
    import fcntl
except ImportError:  # Windows, which locks no folders
    fcntl = None  # type: ignore[assignment]

_NAME_BYTES = 200
"""Longest part of a temporary name that is taken from the file's; file systems allow 255 bytes in all."""

_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""Answers of file systems that lock no folders: NFS, and some in user space."""

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def cache_folder() -> Path:
    """Folder of the cache, as the platform places it ($XDG_CACHE_HOME on Linux)."""
    return Path(platformdirs.user_cache_dir("ourgan-engine", appauthor=False))


class Lock:
    """Lock on a file or folder, exclusive or shared, which the kernel releases when the process dies.

    Attributes:
        held: whether the lock is real; False where the file system or the platform has none.
    """

    def __init__(self, descriptor: int | None, held: bool) -> None:
        self._descriptor = descriptor
        self.held = held

    @classmethod
    def take(cls, path: Path, *, shared: bool = False, makes_file: bool = False) -> Lock | None:
        """Lock what ``path`` names now; None while another holds it. Raises OSError when it cannot be opened.

        Args:
            path: file or folder.
            shared: several may hold the lock, and nobody an exclusive one beside them.
            makes_file: make a missing file. It is opened for writing, without which NFS locks no file exclusively.
        """
        if fcntl is None:
            return cls(None, held=False)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW if makes_file else os.O_RDONLY, 0o666)
        try:
            lock = cls.of(descriptor, shared=shared)
            # Renamed or replaced between the two calls: the lock is on something else.
            if lock is None or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.close(descriptor)
                return None
        except OSError:
            os.close(descriptor)
            raise
        return lock

    @classmethod
    def of(cls, descriptor: int, *, shared: bool = False) -> Lock | None:
        """Lock an open file, which the lock closes in the end; None while another holds it."""
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return cls(descriptor, held=False)
        return cls(descriptor, held=True)

    @staticmethod
    def holder(path: Path) -> int | None:
        """Process that locks what ``path`` names, where the system tells: Linux, unless it runs in another container."""
        try:
            status = os.stat(path)
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            text = Path("/proc/locks").read_text(encoding="ascii")
        except (OSError, AttributeError):
            return None
        match = re.search(rf"FLOCK .* (\d+) {device}:{status.st_ino} ", text)
        return int(match[1]) or None if match else None

    def release(self) -> None:
        """End the lock; again: nothing happens."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def temporary_name(path: Path, kind: str, identity: str = "") -> Path:
    """A name beside ``path`` that nobody else has; ``identity``: 32 hexadecimal digits, by default random ones."""
    return path.with_name(f".{_stem(path)}.{identity or new_identity()}.{kind}")


def new_identity() -> str:
    """32 random hexadecimal digits."""
    return secrets.token_hex(16)


def temporary_names(path: Path, kind: str) -> list[Path]:
    """Existing names that ``temporary_name`` gave for ``path``."""
    pattern = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{32}}\.{kind}")
    try:
        with os.scandir(path.parent) as entries:
            return sorted(path.parent / entry.name for entry in entries if pattern.fullmatch(entry.name))
    except OSError:
        return []


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders of dead writers of ``path``."""
    for part in temporary_names(path, "part"):
        with suppress(OSError):
            mode = part.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                continue
            lock = Lock.take(part)
            if lock is None or not lock.held:
                continue  # alive, or unknown
            if stat.S_ISDIR(mode):
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)
            lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name that replaces ``path`` at the end.

    Yields:
        The temporary name, an empty file in the folder of ``path``. The block writes the whole file there.

    On success the contents are on the disk before the file gets its name, and the name is on the disk at the end. On any
    failure, an interrupt included, the temporary file is removed and ``path`` stays as it was; only where another file was
    replaced and its folder cannot be synchronised, the new file stays, whole. Raises OSError as the file system does, with
    the name ``path`` in place of the temporary one or none.
    """
    is_new = not os.path.lexists(path)
    remove_leftovers(path)
    part, lock = _new_part(path)
    try:
        yield part
        sync_file(part)
        part.replace(path)
        try:
            sync_folder(path.parent)
        except OSError:
            if is_new:  # the same command would find a file that exists
                path.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)
        lock.release()


@contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """A new folder under a temporary name beside ``path``, removed at the end unless it was moved.

    Folders that dead writers of ``path`` left are removed first. Raises OSError.
    """
    remove_leftovers(path)
    while True:
        part = temporary_name(path, "part")
        part.mkdir()
        lock = Lock.take(part)
        # Another process may have taken the new folder for a leftover before it was locked.
        if lock is not None and part.exists():
            break
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        lock.release()


def move_folder(part: Path, path: Path) -> None:
    """Give a folder its name; one that has the name is removed. If it fails, both are as before. Raises OSError."""
    aside = path.rename(temporary_name(path, "part")) if path.is_dir() else None
    try:
        part.rename(path)
    except BaseException:
        if aside is not None:
            aside.rename(path)
        raise
    sync_folder(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all; a device or a pipe is written in place."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def sync_file(path: Path) -> None:
    """Wait until a file's contents are on the disk. Raises OSError if it is no regular file."""
    descriptor = os.open(path, os.O_RDWR | _NO_FOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes | memoryview) -> None:
    """Write a file that must not exist, and wait until its contents are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
    with open(descriptor, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(descriptor)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, some of which other processes may rename meanwhile."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's contents. Raises OSError when the file cannot be read."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _new_part(path: Path) -> tuple[Path, Lock]:
    """An empty temporary file, and the lock on it."""
    while True:
        part = temporary_name(path, "part")
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
        if fcntl is None:
            os.close(descriptor)  # Windows renames no open files
            return part, Lock(None, held=False)
        lock = Lock.of(descriptor)
        # Another process may have taken the new file for a leftover before it was locked.
        if lock is not None and part.exists():
            return part, lock


def _stem(path: Path) -> str:
    """The file's name, shortened where the temporary name would be too long."""
    name = path.name
    if len(os.fsencode(name)) <= _NAME_BYTES:
        return name
    return f"{name[: _NAME_BYTES // 8]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
