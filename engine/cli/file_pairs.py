"""Inputs and outputs of a command that turns many pictures into many files."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.cli.options import Format
from engine.cli.working import Output
from engine.errors import InputError, UsageError, option
from engine.exporters import PICTURES, names_export, names_picture
from engine.io.objects import as_place, check_local
from engine.io.photo import SUFFIXES

DEFAULT_FORMAT: Format = "png"


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture and its result."""

    source: Path
    """Picture; it need not exist or be one."""
    output: Output
    """Place of the result."""


def is_one_picture(names: Sequence[str]) -> bool:
    """Whether the user names one picture, and neither a folder nor a pattern."""
    return len(names) == 1 and not os.path.isdir(names[0]) and find_pictures(names) == [Path(names[0])]


def find_pictures(names: Iterable[str]) -> list[Path]:
    """Pictures of files, folders (their pictures, without those of folders below) and patterns; each once, in order.

    A file that is named is taken whatever its suffix, also if it does not exist: the work on it says what is wrong.

    Raises:
        InputError: a folder without a picture.
    """
    found: dict[str, Path] = {}
    for name in names:
        for path in _matches(name):
            for picture in _inside(path) if path.is_dir() else [path]:
                found.setdefault(os.path.realpath(picture), picture)
    return list(found.values())


def output_of(picture: Path, out: Path, suffix: Format | None) -> Output:
    """Result of one picture: the file that ``out`` names, or a file in that folder.

    Raises:
        UsageError: a name with the suffix of no format, or with one beside ``suffix``.
    """
    if out.is_dir() and out.suffix != ".zarr":
        return pairs_of([picture], out, suffix)[0].output
    if out.suffix != ".zarr" and not names_picture(out):
        if not out.suffix:
            return pairs_of([picture], out, suffix)[0].output
        raise UsageError(f"{option('out', out)}: no such format; use {', '.join(PICTURES)}, .zarr, or a folder")
    if suffix is not None:
        raise UsageError(f"{option('format', suffix)}: {out} names the format already; leave one out")
    return Output(as_place(out))


def pairs_of(pictures: Sequence[Path], out: Path, suffix: Format | None) -> list[Pair]:
    """A file in the folder ``out`` for every picture: ``a.png`` for ``a.jpg``, or ``a.jpg.png`` beside another ``a``.

    Raises:
        UsageError: ``out`` names a file or a folder that pictures come from.
        InputError: ``out`` is a file.
    """
    if not out.is_dir() and (names_export(out) or out.suffix.lower() in (*SUFFIXES, ".zarr")):
        number = len(pictures)
        raise UsageError(f"{option('out', out)}: names one result, for {number} pictures; name a folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder")
    suffix = suffix or DEFAULT_FORMAT
    stems = Counter(picture.stem.casefold() for picture in pictures)
    names = [p.stem if stems[p.stem.casefold()] == 1 else p.name for p in pictures]
    repeated = Counter(name.casefold() for name in names)
    for picture, name in zip(pictures, names, strict=True):
        if repeated[name.casefold()] > 1:
            raise UsageError(f"{picture}: another picture has this name; write their results into folders of their own")
    return [Pair(p, Output(as_place(out / f"{name}.{suffix}"))) for p, name in zip(pictures, names, strict=True)]


def check_sources_stay(pairs: Sequence[Pair], folders: Iterable[str], out: Path) -> None:
    """Refuse results that would replace a picture, or lie among the pictures of the same command. Raises UsageError."""
    for folder in folders:
        if out.is_dir() and os.path.isdir(folder) and os.path.samefile(out, folder):
            raise UsageError(f"{option('out', out)}: is the folder of the pictures; name another")
    sources = {os.path.realpath(pair.source) for pair in pairs}
    for pair in pairs:
        if os.path.realpath(check_local("out", pair.output.path)) in sources:
            raise UsageError(f"{option('out', out)}: {pair.output.path} is a picture to enlarge; name another folder")


def _matches(name: str) -> list[Path]:
    """The paths that a pattern matches, in order; the name itself if it is no pattern, or names a file."""
    if not glob.has_magic(name) or os.path.lexists(name):
        return [Path(name)]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise InputError(f"{name}: matches no file; name pictures, folders or another pattern")
    return [Path(match) for match in matches]


def _inside(folder: Path) -> list[Path]:
    pictures = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and not p.is_dir()
    )
    if not pictures:
        raise InputError(f"{folder}: no picture in this folder ({', '.join(SUFFIXES)}); name another")
    return pictures
