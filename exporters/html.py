"""A web page: ``NAME.html`` and a folder ``NAME_page`` of tiles for any web server, or both in one ZIP archive.

The page is that of ``engine view``, with its description of the picture inside and tiles in place of a server. It loads
nothing from elsewhere.
"""

from __future__ import annotations

import html
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.errors import UsageError
from engine.exporters.job import Progress, parse_options
from engine.exporters.place import PagePlace, stem_of
from engine.exporters.tiles import FolderSink, TileOptions, Tiles, ZipSink, new_archive
from engine.exporters.view import View
from engine.geometry import Box
from engine.plan.print_size import DEFAULT_DPI
from engine.version import __version__

_ARCHIVE = ".zip"

_STATIC = importlib.resources.files("engine").joinpath("view", "static")
"""The built page."""

_FINISHED = {
    "complete": True, "running": None, "share": 1, "secondsLeft": None, "cells": [1, 1], "cell": [1, 1],
    "finished": "gA==", "epoch": 0, "problems": [], "resume": None,
}  # fmt: skip
"""State of a finished image, as ``engine.view.source.State`` tells the page."""

_TEXTS = ("model", "seed", "executor", "precision", "backend")
"""Facts of the provenance for the panel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HtmlOptions(TileOptions):
    """Options of a web page."""

    title: str | None = None
    """Title of the page; None: the store's name."""


@dataclass(frozen=True, slots=True)
class HtmlJob:
    """A checked export to a web page."""

    tiles: Tiles
    options: HtmlOptions
    is_archive: bool
    notes: tuple[str, ...] = ()

    @property
    def estimate(self) -> int:
        return self.tiles.estimate + sum(len(_static(name)) for name in (*PagePlace.FILES, "index.html"))

    def write(self, path: Path, on_progress: Progress) -> None:
        """Write the tiles and, at the end, the page, under the name of ``path``."""
        stem = stem_of(path.name, PagePlace.SUFFIX)
        if not self.is_archive:
            self._write(FolderSink(path.parent), stem, path.name, on_progress)
            return
        with new_archive(path) as archive:
            self._write(ZipSink(archive), stem, f"{stem}{PagePlace.SUFFIX}", on_progress)

    def _write(self, sink: FolderSink | ZipSink, stem: str, page: str, on_progress: Progress) -> None:
        folder, side = f"{stem}{PagePlace.FOLDER}", self.options.tile

        def name(level: int, box: Box) -> str:
            return f"{folder}/{level}/{box.x0 // side}_{box.y0 // side}.{self.tiles.suffix}"

        self.tiles.write(sink, name, on_progress)
        sink.collect([sink.put(f"{folder}/{file}", _static(file)) for file in PagePlace.FILES])
        sink.collect([sink.put(page, self._page(folder).encode())])

    def _page(self, folder: str) -> str:
        """The page of ``engine view``, with other addresses and the description of the picture."""
        view, provenance = self.tiles.view, self.tiles.view.provenance
        title = self.options.title or view.store.resolve().name.removesuffix(".zarr")
        address = quote(folder)
        licences = [str(each) for each in provenance.get("licences", ())]
        source = {
            "name": title,
            "sizes": [[level.width, level.height] for level in view.levels],
            "tile": self.options.tile,
            "tiles": f"{address}/{{level}}/{{x}}_{{y}}.{self.tiles.suffix}",
            "transparent": view.pixels.has_alpha,
            "details": {"kind": "picture", "samples": str(view.pixels), "licences": licences, **_facts(provenance)},
            "state": _FINISHED,
        }
        dpi = view.dpi[0] if view.dpi is not None else DEFAULT_DPI
        data = json.dumps({"engine": __version__, "dpi": dpi, "maxRegion": 0, "sources": [source]})
        about = f"{title}: {view.width} x {view.height} pixels. {' '.join(licences)}".strip()
        changes = {
            "<title>engine</title>": f"<title>{html.escape(title)}</title>\n"
            f'<meta name="description" content="{html.escape(about)}">',
            'href="static/': f'href="{address}/',
            'type="module" src="static/': f'defer src="{address}/',  # modules need a server
            "</head>": f'<script id="view" type="application/json">{data.replace("<", chr(92) + "u003c")}</script>\n</head>',
            "</body>": f"<noscript>{html.escape(about)}</noscript>\n</body>",
        }
        page = _static("index.html").decode()
        for old, new in changes.items():
            assert old in page, f"the page of engine view lacks {old}"
            page = page.replace(old, new)
        return page


def prepare(view: View, suffix: str, values: Mapping[str, Any]) -> HtmlJob:
    """Check the options against the view. Nothing is written yet. Raises UsageError."""
    options = checked_options(suffix, values)
    options.for_view(view)
    view.extend(options.tile, exact=True)
    return HtmlJob(Tiles(view, options), options, suffix.endswith(_ARCHIVE))


def checked_options(suffix: str, values: Mapping[str, Any]) -> HtmlOptions:
    """The options of a page. Raises UsageError for one that is unknown or out of range, or where the page is not built."""
    options = parse_options(HtmlOptions, values, suffix)
    if not _STATIC.joinpath("app.js").is_file():
        raise UsageError(
            f"{suffix}: the page of engine view is not built; install node, then: cd viewer && npm ci && npm run build"
        )
    return options


def view_depth(suffix: str, depth: int | None) -> int:
    """Bits per channel that are read: browsers show 8."""
    return 8


def check_size(suffix: str, width: int, height: int) -> None:
    """Accept any size."""


def _static(name: str) -> bytes:
    return _STATIC.joinpath(name).read_bytes()


def _facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What the panel tells of the render."""
    plan = provenance.get("plan")
    fields = {**(plan if isinstance(plan, dict) else {}), **provenance}
    return {key: str(fields[key]) for key in _TEXTS if isinstance(fields.get(key), str | int)}
