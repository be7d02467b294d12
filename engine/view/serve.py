"""Run the viewer's server until it is stopped."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence

import uvicorn

from engine.errors import InputError, option
from engine.view.app import Viewer
from engine.view.guard import LOCAL_NAMES
from engine.view.model import ModelSource
from engine.view.source import TileSource

LOCAL = "127.0.0.1"

PORT = 8765
"""First port that is tried."""

_TRIED = 20

_TAKEN = (errno.EADDRINUSE, errno.EACCES)
"""Errors of one port, after which another is tried."""

MAX_CONNECTIONS = 256
"""Connections and requests at the same time; further ones are refused at once."""


def serve(
    sources: Sequence[TileSource],
    *,
    host: str = LOCAL,
    port: int | None = None,
    dpi: float = 300.0,
    opens_browser: bool = False,
    on_start: Callable[[str], None],
    until: Callable[[], None] | None = None,
    model: ModelSource | None = None,
) -> None:
    """Serve until Ctrl-C, or until the function ``until`` returns.

    Args:
        sources: what is shown.
        host: address to listen at; any other than this machine's own gets a token in the path.
        port: port; by default the first free one from ``PORT``.
        dpi: resolution by which the page states lengths.
        opens_browser: open the page.
        on_start: called with the page's address.
        until: called in a thread.
        model: a model that is explored, in place of sources.

    Raises:
        InputError: the address cannot be used.
    """
    is_local = host in (LOCAL, "localhost", "::1")
    token = None if is_local else secrets.token_urlsafe(24)
    listener = _listen(host, port)
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/{token + '/' if token else ''}"
    try:
        viewer = Viewer(sources, dpi, model)
        asyncio.run(_run(viewer, listener, address, token, opens_browser, on_start, until))
    finally:
        listener.close()


async def _run(
    viewer: Viewer,
    listener: socket.socket,
    address: str,
    token: str | None,
    opens_browser: bool,
    on_start: Callable[[str], None],
    until: Callable[[], None] | None,
) -> None:
    config = uvicorn.Config(
        viewer.app(token, LOCAL_NAMES if token is None else ()),
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=1,
        ws="none",
    )
    server = _Server(config, viewer)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.02)
    if server.started:
        on_start(address)
        if opens_browser and _has_display():
            await asyncio.to_thread(webbrowser.open, address)
        if until is not None:
            await asyncio.to_thread(until)
            server.should_exit = True
    await running


class _Server(uvicorn.Server):
    """A server whose waiting connections end with it."""

    def __init__(self, config: uvicorn.Config, viewer: Viewer) -> None:
        super().__init__(config)
        self._viewer = viewer

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._viewer.close()
        await super().shutdown(sockets)


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens. Raises InputError where the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tried = [port] if port is not None else [*range(PORT, PORT + _TRIED), 0]
    for number in tried:
        try:
            return socket.create_server((host, number), family=family, backlog=128)
        except OSError as error:
            problem = error
            if error.errno not in _TAKEN:
                break
    reason = problem.strerror or problem
    raise InputError(
        f"{host}:{tried[0]}: cannot be listened at ({reason}); give another {option('port')} or {option('host')}"
    ) from problem


def _has_display() -> bool:
    """Whether a browser would have a window: without one, Python may start a browser of the terminal."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
