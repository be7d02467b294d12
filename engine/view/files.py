"""The files of a store, read-only: for programs that open OME-Zarr by its address."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from engine.io.first_look import FIRST_LOOK
from engine.io.provenance import ATTRIBUTE, COMMAND, IDENTITY

_METADATA = ("zarr.json", ".zattrs", ".zgroup", ".zarray", ".zmetadata")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_CHUNK = re.compile(r"\d{1,9}(\.\d{1,9})*")
_MAX_PARTS = 12

_PRIVATE = (COMMAND, IDENTITY, FIRST_LOOK)
"""Entries of an unfinished store's provenance: they name local files, or are large."""

CORS = {
    "access-control-allow-origin": "*",
    "access-control-allow-methods": "GET, HEAD, OPTIONS",
    "access-control-allow-headers": "range, if-range, if-none-match",
    "access-control-allow-private-network": "true",
    "access-control-expose-headers": "content-length, content-range, etag, accept-ranges",
    "access-control-max-age": "600",
    "cross-origin-resource-policy": "cross-origin",
    "cache-control": "no-cache",
}
"""Any page may read the files: the browser asks for the user's permission where it protects local addresses."""


def store_file(root: Path, name: str, request: Request) -> Response:
    """A file of a store, or the answer that there is none. Ranges are honoured.

    Args:
        root: folder of the store.
        name: path below it, as the client asked for it.
        request: the request.
    """
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=CORS)
    path = _path(root, name)
    if path is None:
        return PlainTextResponse("not found", 404, headers=CORS)
    if name == "zarr.json":
        return _root_metadata(path)
    media = "application/json" if path.name in _METADATA else "application/octet-stream"
    return FileResponse(path, media_type=media, headers=CORS)


def _path(root: Path, name: str) -> Path | None:
    """File of a store; None for names that no store has, for links, and where there is no regular file."""
    *folders, last = name.split("/")
    is_known = last in _METADATA or _CHUNK.fullmatch(last)
    if not is_known or len(folders) > _MAX_PARTS or not all(map(_NAME.fullmatch, folders)):
        return None
    path = root
    for part in (*folders, last):
        path = path / part
        try:
            mode = path.lstat().st_mode
        except OSError:
            return None
        if not (stat.S_ISREG(mode) if part is last and path == root.joinpath(name) else stat.S_ISDIR(mode)):
            return None
    return path


def _root_metadata(path: Path) -> Response:
    """The metadata of the store without what is private."""
    try:
        metadata = json.loads(path.read_bytes())
        provenance = metadata["attributes"].get(ATTRIBUTE)
        if isinstance(provenance, dict):
            for key in _PRIVATE:
                provenance.pop(key, None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return PlainTextResponse("not readable", 404, headers=CORS)
    return Response(json.dumps(metadata), media_type="application/json", headers=CORS)
