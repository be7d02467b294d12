"""``engine view``: a page of a store in the browser, alone or beside a render."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.cli import report
from engine.cli.progress import Estimate, Meter, log
from engine.errors import UsageError, option
from engine.interrupt import deferred_interrupt
from engine.io.objects import Place, as_place, local_copy
from engine.view.beside import Beside, check_ready, viewer_beside


def view(
    store_path: Path, other_path: Path | None, *, host: str, port: int | None, dpi: float | None, opens_browser: bool
) -> None:
    """Serve a store, and what it is compared with, until Ctrl-C."""
    check_ready()
    from engine.view.picture import PictureSource
    from engine.view.serve import serve
    from engine.view.source import TileSource
    from engine.view.store import StoreSource

    store = as_place(store_path)
    other = None if other_path is None else as_place(other_path)
    if store.is_file():
        raise UsageError(f"{store}: is no store; name the folder that engine render wrote, and a picture behind it")
    if dpi is not None and not 1 <= dpi <= 100_000:
        raise UsageError(f"{option('dpi', f'{dpi:g}')}: must be 1 to 100000; give 150 to 300")
    if port is not None and not 0 <= port <= 65535:
        raise UsageError(f"{option('port', port)}: must be 0 to 65535; leave it out for a free one")
    sources: list[TileSource] = [StoreSource(store)]
    if other is not None:
        name = other.name if other.name != store.name else f"{other.name} (2)"
        assert other_path is not None
        sources.append(PictureSource(local_copy(other_path), name) if other.is_file() else StoreSource(other, name))

    def started(address: str) -> None:
        report.line(f"{store}: {address}")
        log("press Ctrl-C to end")

    try:
        serve(
            sources,
            host=host,
            port=port,
            dpi=dpi or 300.0,
            opens_browser=opens_browser,
            on_start=started,
        )
    except KeyboardInterrupt:  # the way to end it
        return


@dataclass
class TellingMeter:
    """A meter that also tells a viewer."""

    meter: Meter
    viewer: Beside
    estimate: Estimate

    def advance(self, amount: float, note: str = "", left: float | None = None) -> None:
        """Add ``amount`` units of work."""
        self.meter.advance(amount, note, left)
        self.estimate.advance(amount, left)
        self.viewer.tell(self.estimate.share, self.estimate.left)


@contextmanager
def beside(store: Place, *, is_wanted: bool) -> Iterator[Beside | None]:
    """A viewer beside a render, which stays until Ctrl-C when the block has ended well; None if it is not wanted."""
    if not is_wanted:
        yield None
        return
    with viewer_beside(store, opens_browser=True) as (viewer, address):
        log(f"look at it: {address}")
        yield viewer
        log(f"still shown: {address}; press Ctrl-C to end")
        with deferred_interrupt() as stop:
            while not stop.is_set() and viewer.is_running:
                viewer.wait(0.2)
