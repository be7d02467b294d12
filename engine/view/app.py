"""The viewer's ASGI application: the page, tiles, regions, events, and the files of the stores."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from engine.errors import EngineError
from engine.geometry import Box
from engine.io.objects import ObjectPath
from engine.version import __version__
from engine.view.beside import STATIC
from engine.view.files import CORS, store_file
from engine.view.guard import ACTIONS, LOCAL_NAMES, Guard
from engine.view.model import ModelSource
from engine.view.png import png_of, png_rows
from engine.view.pool import Busy, TilePool
from engine.view.source import TILE, Pixels, TileSource, tiles_of
from engine.view.store import StoreSource

MAX_REGION = 256_000_000
"""Pixels of a region that is downloaded."""

MAX_REGION_WIDTH = 65_536

MAX_LISTENERS = 32
"""Connections that wait for events."""

MAX_DOWNLOADS = 2

_HEARTBEAT = 15.0
"""Seconds between signs of life on a quiet connection."""

_LOOK_GROWING, _LOOK_FINISHED = 0.5, 3.0
"""Seconds between looks at the disk."""

_LEAST_PAUSE = 0.1
"""Seconds between two looks, however often a model changes."""

_STATIC_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".txt": "text/plain",
    ".svg": "image/svg+xml",
}
_NUMBER = re.compile(r"\d{1,9}")
_SEED = re.compile(r"[0-9]{1,20}")
_ACTIONS = {
    "samples": ("first", "count"),
    "view": ("x", "y", "width", "height"),
    "crop": ("gain", "x", "y"),
    "render": ("on",),
    "open": (),
}
"""Actions that the page may request of a model -> names of their numbers; gains are percentages."""

_BUSY = {"retry-after": "1"}


class Viewer:
    """The state of a viewer: its sources, the pool, and those who wait for events.

    Args:
        sources: what is shown; the second is compared with the first.
        dpi: resolution by which lengths are stated.
        model: a model that is explored: then the store that it fills is shown, as soon as there is one, in place of sources.
    """

    def __init__(self, sources: Sequence[TileSource], dpi: float = 300.0, model: ModelSource | None = None) -> None:
        self.sources = tuple(sources)
        self.dpi = dpi
        self.model = model
        self._canvas = 0
        """Number of the model's store that is shown; 0 for none."""
        self._look: Pixels | None = None
        self._wake = asyncio.Event()
        self.pool = TilePool(self.sources)
        self.closing = asyncio.Event()
        self._changed = asyncio.Condition()
        self._revision = 0
        self._listeners = 0
        self._downloads = 0

    def app(self, token: str | None = None, names: Sequence[str] = LOCAL_NAMES) -> ASGIApp:
        """The application.

        Args:
            token: first part of every path; None for none.
            names: names of the host that are accepted; empty for any.
        """
        routes = [
            Route("/", self._page),
            Route("/static/{name}", self._static),
            Route("/api/view.json", self._view),
            Route("/api/tile/{source}/{level}/{x}_{y}.png", self._tile),
            Route("/api/region/{source}.png", self._region),
            Route("/api/events", self._events),
            Route("/api/sample/{sheet}/{seed}.png", self._sample),
            Route("/api/crop/{number}.png", self._crop),
            Route(f"{ACTIONS}{{action}}", self._act, methods=["POST"]),
            Route("/zarr/{name}/{path:path}", self._file, methods=["GET", "HEAD", "OPTIONS"]),
        ]
        app = Starlette(routes=routes, lifespan=self._lifespan)
        return Guard(app, token, names, takes_actions=self.model is not None)

    async def changed(self) -> None:
        """Tell those who wait that a source has changed."""
        async with self._changed:
            self._revision += 1
            self._changed.notify_all()

    async def close(self) -> None:
        """End all connections that wait."""
        self.closing.set()
        await self.changed()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        if self.model is not None:
            loop = asyncio.get_running_loop()
            self.model.on_change = lambda: _call_in(loop, self._wake.set)
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            self.pool.close()

    async def _watch(self) -> None:
        """Look at the sources until the end: now and then, and when the model has changed."""
        while not self.closing.is_set():
            grows = self.model is not None or any(source.grows for source in self.sources)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_GROWING if grows else _LOOK_FINISHED):
                    await self._wake.wait()
            changed = self._wake.is_set()
            self._wake.clear()
            if self.model is not None:
                await asyncio.to_thread(self._take_canvas, self.model)
            results = [await asyncio.to_thread(_refreshed, source) for source in self.sources]
            if changed or any(results):
                await self.changed()
            await asyncio.sleep(_LEAST_PAUSE)

    def _take_canvas(self, model: ModelSource) -> None:
        """Show the store that the model fills now."""
        canvas, look = model.canvas, model.look
        number, path = canvas or (0, None)
        if number != self._canvas:
            try:
                sources = () if path is None else (StoreSource(path),)
            except (EngineError, OSError):  # it has been left meanwhile
                return
            self.pool.show(sources)
            self.sources, self._canvas, self._look = sources, number, None
        if look is not None and look is not self._look and isinstance(source := self.sources[0], StoreSource):
            source.show(look)
            self._look = look

    async def _page(self, request: Request) -> Response:
        return _static_file("index.html")

    async def _static(self, request: Request) -> Response:
        return _static_file(request.path_params["name"])

    async def _view(self, request: Request) -> Response:
        sources = [
            {
                "name": source.name,
                "sizes": source.sizes,
                "tile": TILE,
                "details": source.describe(),
                "state": source.state.to_json(),
            }
            for source in self.sources
        ]
        facts = {"engine": __version__, "dpi": self.dpi, "maxRegion": MAX_REGION, "sources": sources}
        return _json(facts | {"model": await asyncio.to_thread(self._model_state)})

    def _model_state(self) -> dict[str, Any] | None:
        """State of the model, with the number of the store that is shown."""
        return None if self.model is None else {**self.model.state, "canvas": self._canvas}

    async def _tile(self, request: Request) -> Response:
        numbers = _numbers(request, "source", "level", "x", "y")
        if numbers is None or not self._has_tile(*numbers):
            return PlainTextResponse("no such tile", 404)
        try:
            tile = await self.pool.tile(*numbers)
        except Busy:
            return PlainTextResponse("busy", 503, headers=_BUSY)
        except (EngineError, OSError, MemoryError):
            return PlainTextResponse("not readable", 404)
        tag = f'"{tile.version}-{tile.kind}"'
        headers = {"etag": tag, "cache-control": "no-cache", "x-tile": tile.kind}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(tile.data, media_type="image/png", headers=headers)

    async def _region(self, request: Request) -> Response:
        source = _numbers(request, "source")
        place = [request.query_params.get(key, "") for key in ("x", "y", "width", "height")]
        if source is None or source[0] >= len(self.sources) or not all(map(_NUMBER.fullmatch, place)):
            return PlainTextResponse("no such region", 404)
        image = self.sources[source[0]]
        x, y, width, height = map(int, place)
        box, (full_width, full_height) = Box(y, x, y + height, x + width), image.sizes[0]
        if not (width and height and Box(0, 0, full_height, full_width).contains(box)):
            return PlainTextResponse("no such region", 404)
        if box.area > MAX_REGION or width > MAX_REGION_WIDTH:
            return PlainTextResponse("too large; use engine export, or a smaller region", 413)
        if not _is_finished(image, box):
            return PlainTextResponse("not finished there; wait, or choose a finished region", 409)
        if self._downloads >= MAX_DOWNLOADS:
            return PlainTextResponse("busy", 503, headers=_BUSY)
        name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(image.name).stem) or "region"
        headers = {"content-disposition": f'attachment; filename="{name}-{x}-{y}-{width}x{height}.png"'}
        if request.method == "HEAD":  # the page asks first
            return Response(media_type="image/png", headers=headers)
        return StreamingResponse(self._download(image, box), media_type="image/png", headers=headers)

    async def _download(self, image: TileSource, box: Box) -> AsyncIterator[bytes]:
        self._downloads += 1
        try:
            parts = png_rows(box, image.read, TILE)
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                yield part
        finally:
            self._downloads -= 1

    async def _events(self, request: Request) -> Response:
        if self._listeners >= MAX_LISTENERS:
            return PlainTextResponse("busy", 503, headers=_BUSY)
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[str]:
        """The state of all sources now and after each change; it holds no history, so a client may reconnect at any time."""
        self._listeners += 1
        seen = -1
        try:
            yield "retry: 1000\n\n"
            while not self.closing.is_set():
                if seen != self._revision:
                    seen = self._revision
                    states = [source.state.to_json() for source in self.sources]
                    model = await asyncio.to_thread(self._model_state)
                    yield f"data: {json.dumps({'sources': states, 'model': model})}\n\n"
                try:
                    async with asyncio.timeout(_HEARTBEAT), self._changed:
                        while seen == self._revision:
                            await self._changed.wait()
                except TimeoutError:
                    yield ": alive\n\n"
        finally:
            self._listeners -= 1
            if self.model is not None and not self._listeners:  # the last page is closed
                self.model.view(None)
                self.model.want_samples(0, 0)

    async def _sample(self, request: Request) -> Response:
        numbers = _numbers(request, "sheet", "seed")
        return await _picture(None if numbers is None or self.model is None else self.model.sample(*numbers))

    async def _crop(self, request: Request) -> Response:
        numbers = _numbers(request, "number")
        return await _picture(None if numbers is None or self.model is None else self.model.crop(*numbers))

    async def _act(self, request: Request) -> Response:
        """What the page asks of the model; its values are in the query, as no body is taken."""
        model, values = self.model, request.query_params
        if model is None:
            return PlainTextResponse("read only", 405)
        action = request.path_params["action"]
        texts = [values.get(name, "") for name in _ACTIONS.get(action, ())]
        if action not in _ACTIONS or not all(_SEED.fullmatch(text) for text in texts):
            return PlainTextResponse("no such action", 404)
        numbers = [int(text) for text in texts]
        try:
            if action == "samples":
                model.want_samples(*numbers)
            elif action == "view":
                x, y, width, height = numbers
                model.view(Box(y, x, y + height, x + width) if width and height else None)
            elif action == "crop":
                percentage, x, y = numbers
                model.want_crop(percentage / 100, x, y)
            elif action == "render":
                model.render(is_wanted=bool(numbers[0]))
            else:
                seed, gain = values.get("seed"), values.get("gain")
                if seed is not None and not _SEED.fullmatch(seed):
                    return PlainTextResponse("this seed is no whole number; give one from 0 on")
                if gain is not None and not _NUMBER.fullmatch(gain):
                    return PlainTextResponse("no such action", 404)
                factor = None if gain is None else int(gain) / 100
                model.open(None if seed is None else int(seed), values.get("size"), factor)
        except EngineError as error:
            return PlainTextResponse(error.for_command_line())  # for its user, and no error in the browser's console
        self._wake.set()
        return Response(status_code=204)

    async def _file(self, request: Request) -> Response:
        source = next((s for s in self.sources if s.name == request.path_params["name"]), None)
        if not isinstance(source, StoreSource):
            return PlainTextResponse("no such store", 404)
        if isinstance(source.path, ObjectPath):
            return PlainTextResponse("the files of this store are in its object store", 404, headers=CORS)
        return await asyncio.to_thread(store_file, source.path, request.path_params["path"], request)

    def _has_tile(self, source: int, level: int, x: int, y: int) -> bool:
        if source >= len(self.sources) or level >= len(self.sources[source].sizes):
            return False
        columns, rows = tiles_of(self.sources[source].sizes[level])
        return x < columns and y < rows


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call a function in the loop of another thread, unless that has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


def _refreshed(source: TileSource) -> bool:
    try:
        return source.refresh()
    except (EngineError, OSError):
        return True


def _numbers(request: Request, *names: str) -> list[int] | None:
    texts = [request.path_params[name] for name in names]
    fits = [(_SEED if name == "seed" else _NUMBER).fullmatch(text) for name, text in zip(names, texts, strict=True)]
    return [int(text) for text in texts] if all(fits) else None


def _is_finished(source: TileSource, box: Box) -> bool:
    """Whether all pixels of a region are finished."""
    state = source.state
    if state.finished.shape == (1, 1):
        return bool(state.finished[0, 0])
    rows, columns = state.cell
    part = state.finished[box.y0 // rows : -(-box.y1 // rows), box.x0 // columns : -(-box.x1 // columns)]
    return bool(part.all())


async def _picture(pixels: Pixels | None) -> Response:
    """Pixels of a model as PNG, if they are there."""
    if pixels is None:
        return PlainTextResponse("no such picture", 404)
    return Response(await asyncio.to_thread(png_of, pixels), media_type="image/png")


def _json(data: Any) -> Response:  # noqa: ANN401 (any JSON)
    return Response(json.dumps(data), media_type="application/json")


def _static_file(name: str) -> Response:
    path = STATIC / name
    media = _STATIC_TYPES.get(path.suffix)
    if media is None or "/" in name or name.startswith(".") or not path.is_file():
        return PlainTextResponse("not found", 404)
    return FileResponse(path, media_type=media, headers={"cache-control": "no-cache"})
