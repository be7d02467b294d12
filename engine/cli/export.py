"""The command ``engine export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.cli import report
from engine.cli.progress import by_count, meter, warn
from engine.device.heap import fix_malloc_thresholds
from engine.errors import counted
from engine.exporters import export as write


def export(store: Path, out: Path, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Export a store with a progress bar and print a line about the file; ``options`` go to the exporter."""
    fix_malloc_thresholds()
    with meter(f"writing {out.name}", 1.0) as bar:
        result = write(store, out, on_progress=by_count(bar), **options)
    for note in result.notes:
        warn(note)
    if as_json:
        report.print_json({**asdict(result), "path": str(result.path)})
    else:
        size = f"{result.width}x{result.height}, {counted(result.levels, 'level')}, {report.file_size(result.bytes)}"
        report.line(f"{result.path}: {size}, {result.seconds:.1f} s")
