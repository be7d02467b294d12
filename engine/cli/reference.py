"""The reference of the command line as Markdown, written from the parser: ``python -m engine.cli.reference``."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from cyclopts import App, Argument

from engine.cli.app import app
from engine.errors import EngineError

_WIDTH = 100
_METAVARS = {Path: "PATH", int: "INT", float: "FLOAT", str: "TEXT"}

_FAILURE = "Any other failure: a full disk, exhausted memory, lost output, or an internal error (`ENGINE_TRACEBACK=1` shows where)."

_HEAD = """\
Results go to stdout; messages and progress go to stderr. Sizes are WIDTHxHEIGHT in pixels. Memory needs a unit, such
as 2GiB or 800MB. `engine COMMAND --help` prints the same texts, and `python -m engine` is the same program.
`engine --install-completion` installs tab completion for bash, zsh, fish or PowerShell.
"""


def reference() -> str:
    """The whole page: commands, exit codes, the options of every command, and the options that commands share."""
    commands = dict(commands_of(app))
    shared = _shared_options(commands)
    blocks = [
        "# Command line",
        "<!-- Written by: python -m engine.cli.reference > docs/cli.md -->",
        _wrapped(_HEAD),
        _table(
            ("command", "purpose"),
            ((f"[{name}]({_anchor(name)})", _purpose(c).splitlines()[0]) for name, c in commands.items()),
        ),
        "## Exit codes",
        _table(("code", "meaning"), _exit_codes()),
    ]
    for name, command in commands.items():
        blocks += _section(name, command)
        blocks += [
            f"Also the [{title.lower()}]({_anchor(title)})." for title, (users, _) in shared.items() if name in users
        ]
    for title, (users, options) in shared.items():
        blocks += [f"## {title}", f"For {', '.join(f'`{name}`' for name in users)}.", _options(options)]
    return "\n\n".join(blocks) + "\n"


def commands_of(group: App, before: str = "engine") -> Iterator[tuple[str, App]]:
    """Every command that can be called, with its words ("engine train sr"); groups of commands come last."""
    subcommands = [name for name in group if not name.startswith("-")]
    if group.default_command is not None:
        yield before, group
    for name in sorted(subcommands, key=lambda name: any(not word.startswith("-") for word in group[name])):
        yield from commands_of(group[name], f"{before} {name}")


def _shared_options(commands: dict[str, App]) -> dict[str, tuple[list[str], list[Argument]]]:
    """Options that are fields of a dataclass, by title: the commands that take them, and the options."""
    users: dict[object, list[str]] = {}
    fields: dict[object, list[Argument]] = {}
    for name, command in commands.items():
        for argument in _arguments(command):
            if argument.children:
                users.setdefault(argument.hint, []).append(name)
                fields[argument.hint] = [option for option in argument.children if option.parse]
    shared: dict[str, tuple[list[str], list[Argument]]] = {}
    for kind, names in users.items():
        title = f"{names[0].split()[1].capitalize()} options"
        if title in shared:  # of a class beside the command's main one
            title = f"{getattr(kind, '__name__', '').removesuffix('Options')} options"
        shared[title] = names, fields[kind]
    return shared


def _section(name: str, command: App) -> list[str]:
    own = [argument for argument in _arguments(command) if argument.show and not argument.keys]
    options = [argument for argument in own if argument.name.startswith("-")]
    positional = [argument for argument in own if argument not in options]
    required = [f"{argument.name} {_value(argument)}" for argument in options if argument.required]
    usage = " ".join(
        [name, *(_placeholder(argument) for argument in positional), *required, *(["[OPTIONS]"] if options else [])]
    )
    blocks = [f"## {name}", f"    {usage}", _wrapped(_purpose(command))]
    if any(argument.parameter.help for argument in positional):
        blocks.append(_table(("argument", "meaning"), ((f"`{a.name}`", a.parameter.help or "") for a in positional)))
    return [*blocks, _options(options)] if options else blocks


def _arguments(command: App) -> Sequence[Argument]:
    return command.assemble_argument_collection(default_parameter=app.default_parameter, parse_docstring=True)


def _purpose(command: App) -> str:
    """The docstring of a command without its section of arguments."""
    return inspect.cleandoc(command.help).partition("\n\nArgs:")[0]


def _placeholder(argument: Argument) -> str:
    name = f"{argument.name}..." if _is_repeated(argument) else argument.name
    return name if argument.required else f"[{name}]"


def _options(options: Sequence[Argument]) -> str:
    return _table(
        ("option", "default", "meaning"),
        ((f"`{_spelling(option)}`", _default(option), option.parameter.help or "") for option in options),
    )


def _spelling(option: Argument) -> str:
    """All names of an option with a placeholder for its value; a flag takes none."""
    names, value = ", ".join(option.names), _value(option)
    return f"{names} {value}" if value else names


def _value(option: Argument) -> str:
    kinds = set(_types(option.hint))
    if bool in kinds:
        return ""
    if choices := option.get_choices():
        return "|".join(choices)
    return option.parameter.metavar or next((name for kind, name in _METAVARS.items() if kind in kinds), "VALUE")


def _types(hint: object) -> Iterator[object]:
    """The types inside ``list[int] | None`` and the like."""
    yield hint
    for part in get_args(hint):
        yield from _types(part)


def _is_repeated(argument: Argument) -> bool:
    _, consumes_all = argument.token_count()
    return bool(consumes_all)


def _default(option: Argument) -> str:
    if option.required:
        return "required"
    value = option.field_info.default
    return "" if value is None or value is False or value == "" else f"`{value}`"


def _exit_codes() -> Iterator[tuple[str, str]]:
    """Each exit code with the first lines of its errors' docstrings; other modules refine these errors, or are not imported."""
    yield "0", "Success."
    causes = {
        EngineError.exit_code: [
            "Any other failure: pictures among several (engine upscale), a full disk, exhausted memory, lost output, an internal "
            "error (ENGINE_TRACEBACK=1 shows where)."
        ]
    }
    for kind in _subclasses(EngineError):
        if kind.__module__ != EngineError.__module__:
            continue
        causes.setdefault(kind.exit_code, []).append((kind.__doc__ or "").splitlines()[0])
    for code, lines in sorted(causes.items()):
        yield str(code), " ".join(lines)


def _subclasses(kind: type[EngineError]) -> Iterator[type[EngineError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [
        header,
        ["---"] * len(header),
        *([" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _anchor(title: str) -> str:
    return "#" + title.lower().replace(" ", "-")


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.stdout.write(reference())
