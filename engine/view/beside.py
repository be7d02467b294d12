"""The viewer in a process beside a render: its memory and its threads are not the render's.

The render writes a line of progress now and then to the standard input of the viewer, which ends with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from engine.errors import EngineError, UsageError
from engine.io.objects import Place

STATIC = Path(__file__).parent / "static"
"""The built page."""

_INTERVAL = 0.5
"""Seconds between lines of progress."""


def check_ready() -> None:
    """Raise UsageError where the packages of the extra ``view`` are missing, or the page was not built."""
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UsageError(f"view: needs {' and '.join(missing)}; pip install 'ourgan-engine[view]'")
    if not (STATIC / "app.js").is_file():
        raise UsageError("view: the page is not built; install node, then: cd viewer && npm ci && npm run build")


class Beside:
    """A running viewer."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._told = 0.0

    def tell(self, share: float, seconds_left: float | None) -> None:
        """Tell the progress of the render, 0 to 1, and the expected time to its end."""
        if share < 1 and time.monotonic() - self._told < _INTERVAL:
            return
        self._told = time.monotonic()
        self._write(json.dumps({"share": share, "secondsLeft": seconds_left}))

    @property
    def is_running(self) -> bool:
        """Whether the viewer is still there."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> None:
        """Wait for the viewer's end, at most some seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # the viewer has ended
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


@contextmanager
def viewer_beside(store: Place, *, opens_browser: bool) -> Iterator[tuple[Beside, str]]:
    """Start a viewer of a store; it ends with the block.

    Yields:
        The viewer and the address of its page.

    Raises:
        EngineError: it does not start.
    """
    words = [sys.executable, "-m", "engine.view", str(store), *(["--browser"] if opens_browser else [])]
    # A session of its own: Ctrl-C goes to the render, which may have to finish a shard.
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise EngineError(f"{store}: the viewer does not start; try engine view {store} in another terminal")
        yield Beside(process), address
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
