"""Errors that the engine raises on purpose: one class for each cause, one exit code for each class.

A message is one line: ``subject: problem (value, limit); do this``. It names options by ``option``, which is spelled as
its reader can type it: ``overwrite=True`` in Python, ``--overwrite`` on the command line.
"""

from __future__ import annotations

import re

MAX_MESSAGE = 300
"""Characters of a message on the command line."""

_KEPT_END = 120
"""Characters at the end of a message that was cut: they say what to do."""

_START, _END = "\x02", "\x03"
_OPTION = re.compile(f"{_START}([^=]*?)(?:=(.*?))?{_END}", re.DOTALL)


def option(name: str, value: object = None) -> str:
    """An option in an error's message.

    Args:
        name: keyword of the Python API; the command line's flag is the same name with dashes.
        value: True for a flag that is to be given; any other value to be given; None to name the option alone.
    """
    return f"{_START}{name}{'' if value is None else f'={value}'}{_END}"


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """One line of ``text``, which may come from a file: nothing in it moves the cursor or colours the terminal.

    Unprintable characters are escaped, and text beyond ``limit`` characters is cut from the middle.
    """
    if len(text) > 4 * limit:  # before millions of characters are looked at
        text = text[: 2 * limit] + text[-2 * limit :]
    line = " ".join(text.splitlines())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in line)
    return line if len(line) <= limit else f"{line[: limit - _KEPT_END - 5]} ... {line[-_KEPT_END:]}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 level", "2 levels"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class EngineError(Exception):
    """Base of every error that the engine raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        """The message with options as Python spells them."""
        return _OPTION.sub(_in_python, super().__str__())

    def for_command_line(self) -> str:
        """The message for a terminal: options as the command line spells them, in one line of at most ``MAX_MESSAGE``."""
        return printable(_OPTION.sub(_as_flag, super().__str__()))


class UsageError(EngineError):
    """The request contradicts itself or names something that does not exist."""

    exit_code = 2


class BudgetError(EngineError):
    """The plan does not fit the memory, VRAM or disk that it may use."""

    exit_code = 3


class AlignmentError(EngineError):
    """A tile, halo or shard does not sit on the grid that a stage demands."""

    exit_code = 3


class InputError(EngineError):
    """A photograph, picture or store that cannot be read or used."""

    exit_code = 4


class StorageError(EngineError):
    """An object store that does not answer, or fails. It says nothing of what lies there."""


class AccessError(StorageError):
    """An object store that refuses access, or has no such bucket."""

    exit_code = 4


class ModelError(InputError):
    """A model file or checkpoint that is damaged, incomplete or of an unknown architecture."""


class ResumeError(InputError):
    """The output exists and cannot be continued with this plan."""


class RenderError(EngineError):
    """A network produced NaN or infinity: nothing was written for that tile."""


class Interrupted(EngineError):
    """Stopped by Ctrl-C, SIGTERM or SIGHUP; a render or training continues with --resume."""

    exit_code = 130


def _in_python(match: re.Match[str]) -> str:
    name, value = match[1], match[2]
    if value is None:
        return name
    return f"{name}={value}" if re.fullmatch(r"True|False|-?[\d.]+(e[+-]\d+)?", value) else f"{name}={value!r}"


def _as_flag(match: re.Match[str]) -> str:
    flag, value = f"--{match[1].replace('_', '-')}", match[2]
    return flag if value in (None, "True") else f"{flag} {value}"
