"""``engine view``: a page of a store or of a model in the browser, alone or beside a render."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.cli import report
from engine.cli.progress import Estimate, Meter, log
from engine.errors import UsageError, option
from engine.interrupt import deferred_interrupt
from engine.io.objects import Place, check_local, local_copy
from engine.plan.request import Request
from engine.view.beside import Beside, check_ready, viewer_beside

if TYPE_CHECKING:
    from engine.view.model import ModelSource
    from engine.view.source import TileSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Options of the page's server."""

    host: str
    port: int | None
    dpi: float | None
    opens_browser: bool

    def check(self) -> None:
        """Raise UsageError for values that no server takes, or where the packages of the page are missing."""
        check_ready()
        if self.dpi is not None and not 1 <= self.dpi <= 100_000:
            raise UsageError(f"{option('dpi', f'{self.dpi:g}')}: must be 1 to 100000; give 150 to 300")
        if self.port is not None and not 0 <= self.port <= 65535:
            raise UsageError(f"{option('port', self.port)}: must be 0 to 65535; leave it out for a free one")

    def serve(self, name: Place, sources: Sequence[TileSource], model: ModelSource | None = None) -> None:
        """Serve until Ctrl-C; ``name``: what is shown, as the user named it."""
        from engine.view.serve import serve

        def started(address: str) -> None:
            report.line(f"{name}: {address}")
            log("press Ctrl-C to end")

        with suppress(KeyboardInterrupt):  # the way to end it
            serve(
                sources,
                host=self.host,
                port=self.port,
                dpi=self.dpi or 300.0,
                opens_browser=self.opens_browser,
                on_start=started,
                model=model,
            )


def view(store: Place, other: Place | None, page: Page) -> None:
    """Serve a store, and what it is compared with, until Ctrl-C."""
    page.check()
    from engine.view.picture import PictureSource
    from engine.view.store import StoreSource

    sources: list[TileSource] = [StoreSource(store)]
    if other is not None:
        name = other.name if other.name != store.name else f"{other.name} (2)"
        sources.append(PictureSource(local_copy(other), name) if other.is_file() else StoreSource(other, name))
    page.serve(store, sources)


def explore(path: Path, request: Request, page: Page, *, out: Path | None, opens_seed: bool) -> None:
    """Serve a model of which what is looked at is computed, until Ctrl-C; then say how to finish the image.

    Args:
        path: model file.
        request: size and first seed, and options of the renders.
        page: options of the server.
        out: folder of the stores; by default ``NAME-views`` in the present folder.
        opens_seed: begin with the image of the seed in place of samples.
    """
    page.check()
    from engine.cli.render import resume_words
    from engine.explore import Exploration
    from engine.model.bundle import load

    model = load(path)
    folder = Path(f"{model.path.stem}-views") if out is None else check_local("out", out)
    exploration = Exploration(model, request, folder, lambda planned: resume_words([path], planned), log)
    if opens_seed:
        exploration.open(request.seed, None)
    exploration.start()
    try:
        page.serve(path, [], exploration)
    finally:
        state = exploration.state
        if state["computing"] or state["opening"]:
            log("stopping after what is computed now; press Ctrl-C again to stop at once")
        command = exploration.close()
    if command is not None:
        report.line(f"finish it: {command}")


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
