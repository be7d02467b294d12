"""What is let through to the viewer: requests of bounded size, to the names and with the token of its address.

They only read, but for the actions of a model's page: those are POST requests without a body that come from the page itself.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_TARGET = 2000
"""Characters of a path with its query."""

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
"""Names by which a browser on this machine may call it: any other one is a page that has its name point here."""

ACTIONS = "/api/do/"
"""Start of the paths of actions."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


class Guard:
    """ASGI middleware.

    Args:
        app: the application behind it.
        token: first part of every path, if the address is not of this machine alone.
        names: names of the host that are accepted; empty for any.
        takes_actions: whether there are actions.
    """

    def __init__(self, app: ASGIApp, token: str | None, names: Iterable[str], *, takes_actions: bool = False) -> None:
        self._takes_actions = takes_actions
        self._app = app
        self._token = token
        self._names = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the server refuses a WebSocket that nobody accepts

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                _secure(MutableHeaders(scope=message))
            await send(message)

        refused = self._refusal(scope)
        if refused is None and self._token is not None:
            prefix = f"/{self._token}"
            first = "/" + scope["path"].lstrip("/").partition("/")[0]
            if not secrets.compare_digest(first.encode(), prefix.encode()):
                refused = PlainTextResponse("not found", 404)
            elif scope["path"] == prefix:
                refused = PlainTextResponse("", 307, headers={"location": f"{prefix}/"})
            else:
                scope = {**scope, "path": scope["path"][len(prefix) :]}
        await (refused or self._app)(scope, receive, send_safely)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        is_action = self._takes_actions and scope["method"] == "POST" and ACTIONS in scope["path"]
        if not is_action and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            return PlainTextResponse("read only", 405, headers={"allow": "GET, HEAD, OPTIONS"})
        if is_action and headers.get("origin", "") != f"http://{headers.get('host', '')}":
            # Browsers state the page that a POST comes from, which a page of others cannot change.
            return PlainTextResponse("not for other sites", 403)
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            return PlainTextResponse("no body is taken", 413)
        path = scope["path"]
        if len(scope.get("raw_path") or path) + len(scope["query_string"]) > MAX_TARGET:
            return PlainTextResponse("too long", 414)
        if self._names and _name_of(headers.get("host", "")) not in self._names:
            return PlainTextResponse("unknown host", 421)
        if not path.isprintable() or "\\" in path or "//" in path or any(p in (".", "..") for p in path.split("/")):
            return PlainTextResponse("not found", 404)
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            # Pages of others read the store's files, as they are allowed to, and make nothing be computed.
            is_store = "/zarr/" in path
            return None if is_store else PlainTextResponse("not for other sites", 403)
        return None


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _secure(headers: MutableHeaders) -> None:
    headers.setdefault("content-security-policy", _POLICY)
    headers.setdefault("cross-origin-resource-policy", "same-origin")
    headers.setdefault("cache-control", "no-store")
    headers["x-content-type-options"] = "nosniff"
    headers["referrer-policy"] = "no-referrer"
