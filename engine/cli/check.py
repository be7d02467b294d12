"""The command ``engine check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.cli import report
from engine.cli.progress import by_count, meter
from engine.errors import InputError, counted, option
from engine.io.objects import Place, as_place
from engine.io.store_check import Damage, Findings, check_store
from engine.metrics.images import open_image
from engine.metrics.seams import Seam, measure_seams


def check(store: Path, *, repair: bool, as_json: bool) -> None:
    """Read a store with a progress bar and print what is damaged.

    Raises:
        InputError: the store is damaged, and ``repair`` is false.
    """
    path = as_place(store)
    with meter(f"reading {path.name}", 1.0) as bar:
        findings = check_store(path, repair=repair, on_progress=by_count(bar))
    if as_json:
        report.print_json(_as_json(path, findings))
    else:
        for damage in findings.damage:
            report.line(f"{damage.file}: {damage.problem} (level {damage.level}, region {_region(damage)})")
        report.line(_summary(path, findings))
    if findings.damage and not repair:
        raise InputError(
            f"{path}: {counted(len(findings.damage), 'shard')} of {findings.shards} damaged; repeat this command with "
            f"{option('repair', True)}, then the store's engine render with {option('resume', True)}"
        )


def check_wrap(image: Path, *, as_json: bool) -> None:
    """Read a picture or a store with a progress bar and print how its opposite sides meet.

    Raises:
        InputError: it is neither, or too small.
    """
    path = as_place(image)
    sample = open_image(image)
    with meter(f"reading {path.name}", 1.0) as bar:
        seams = measure_seams(sample, by_count(bar))
    if as_json:
        report.print_json({"path": str(path), "seams": [seam.to_json() for seam in seams]})
        return
    for seam in seams:
        report.line(f"{path}: {_seam_text(seam)}")


def _seam_text(seam: Seam) -> str:
    lines = "columns" if seam.axis == "x" else "rows"
    verdict = "a seam shows" if seam.is_visible else "no seam"
    return (
        f"along {seam.axis} {verdict}: the sides differ by {seam.jump:.2f} levels, {seam.ratio:.2f} times as much as {lines} "
        f"inside ({seam.typical:.2f} typically, up to {seam.largest:.2f})"
    )


def _summary(path: Place, findings: Findings) -> str:
    shards = counted(findings.shards, "shard")
    if not findings.damage:
        written = findings.shards - findings.missing
        return f"{path}: {f'{shards}, all' if not findings.missing else f'not finished, {written} of {shards}'} intact"
    number = len(findings.damage)
    if not findings.removed and not findings.complete:
        return f"{path}: {number} of {shards} damaged"
    done = f"; {counted(findings.removed, 'file')} removed, give its engine render --resume" if findings.removed else ""
    return f"{path}: {number} of {shards} damaged{done}"


def _region(damage: Damage) -> str:
    box = damage.box
    return f"{box.x0},{box.y0},{box.width},{box.height}"


def _as_json(path: Place, findings: Findings) -> dict[str, Any]:
    return {
        "path": str(path),
        "complete": findings.complete,
        "shards": findings.shards,
        "missing": findings.missing,
        "removed": findings.removed,
        "damaged": [
            {
                "file": str(damage.file),
                "level": damage.level,
                "x": damage.box.x0,
                "y": damage.box.y0,
                "width": damage.box.width,
                "height": damage.box.height,
                "problem": damage.problem,
            }
            for damage in findings.damage
        ],
    }
