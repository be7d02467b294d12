"""The command ``engine finish``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.cli import report
from engine.cli.working import look_command
from engine.errors import counted
from engine.io.objects import Place, as_place
from engine.io.provenance import stored_provenance
from engine.parts import MissingPart, PartsMissing
from engine.parts import finish as complete
from engine.store import open_store, resume_command


def finish(store: Path, *, as_json: bool) -> None:
    """Complete a store and say so, or print which parts are missing and the commands that render them.

    Raises:
        PartsMissing: shards are missing.
        InputError: as ``engine.finish``.
    """
    path = as_place(store)
    try:
        complete(path)
    except PartsMissing as error:
        if as_json:
            report.print_json(
                {"path": str(path), "complete": False, "missing": [_as_json(path, p) for p in error.parts]}
            )
        else:
            for part in error.parts:
                report.line(_text(path, part))
        raise
    if as_json:
        report.print_json({"path": str(path), "complete": True, "missing": []})
        return
    width, height = open_store(store).size
    report.line(f"{path}: {width}x{height}, complete")
    report.line(f"look at it: {look_command(path, width, height)}")


def _text(path: Place, missing: MissingPart) -> str:
    name = "" if missing.part is None else f"part {missing.part}: "
    account = f"{name}{missing.missing} of {counted(missing.shards, 'shard')} missing"
    if missing.process is not None:
        return f"{account}; process {missing.process} renders it"
    command = _command(path, missing)
    return account if command is None else f"{account}; run {command}"


def _command(path: Place, missing: MissingPart) -> str | None:
    """Command that renders a part; None if no command line began the store."""
    return resume_command(path, stored_provenance(path) or {}, None if missing.part is None else str(missing.part))


def _as_json(path: Place, missing: MissingPart) -> dict[str, Any]:
    return {
        "part": None if missing.part is None else str(missing.part),
        "shards": missing.shards,
        "missing": missing.missing,
        "process": missing.process,
        "command": _command(path, missing),
    }
