"""The viewer beside a render, see ``beside``: prints its address, reads progress, and ends with its standard input."""

from __future__ import annotations

import json
import sys
import time

from engine.errors import EngineError
from engine.io.objects import as_place
from engine.view.serve import serve
from engine.view.store import Report, StoreSource


def main() -> int:
    """Run the viewer; returns an exit code."""
    words = sys.argv[1:]
    try:
        source = StoreSource(as_place(words[0]))
        serve([source], opens_browser="--browser" in words, on_start=_tell, until=lambda: _follow(source))
    except (EngineError, KeyboardInterrupt):
        return 1
    return 0


def _tell(address: str) -> None:
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()


def _follow(source: StoreSource) -> None:
    """Take progress until the render has ended."""
    for line in sys.stdin:
        report = json.loads(line)
        source.report = Report(report["share"], report["secondsLeft"], time.monotonic())


if __name__ == "__main__":
    raise SystemExit(main())
