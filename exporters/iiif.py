"""IIIF Image API 3.0, level 0: a folder with ``info.json`` and tiles that any web server can offer without a program.

Mirador, Universal Viewer and OpenSeadragon read it. https://iiif.io/api/image/3.0/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from engine.errors import UsageError, option
from engine.exporters.job import Progress, parse_options
from engine.exporters.tiles import FolderSink, TileOptions, Tiles
from engine.exporters.view import View
from engine.geometry import Box

DEFAULT_URL = "http://localhost:8000"
"""Address of ``python -m http.server`` in the folder that holds the export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IiifOptions(TileOptions):
    """Options of IIIF."""

    url: str = DEFAULT_URL
    """Address of the folder that will hold the export; viewers ask for the tiles there."""

    def __post_init__(self) -> None:
        TileOptions.__post_init__(self)  # super() does not find the class that slots make
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise UsageError(
                f"{option('url')}: {self.url!r} is no address; give one such as https://example.org/pictures"
            )
        if self.tiles == "webp":
            raise UsageError(f"{option('tiles')}: webp is no format of every IIIF viewer; choose jpg or png")


@dataclass(frozen=True, slots=True)
class IiifJob:
    """A checked export to IIIF."""

    tiles: Tiles
    options: IiifOptions

    @property
    def estimate(self) -> int:
        return self.tiles.estimate

    @property
    def notes(self) -> tuple[str, ...]:
        if self.options.url != DEFAULT_URL:
            return ()
        return (
            f"its info.json names {self.options.url}, where viewers ask for the tiles; give the address of its host",
        )

    def write(self, path: Path, on_progress: Progress) -> None:
        """Write the tiles and, at the end, info.json."""
        sink = FolderSink(path)
        self.tiles.write(sink, self._name, on_progress)
        sink.put("info.json", (json.dumps(self._info(path.name), indent=2) + "\n").encode())

    def _info(self, name: str) -> dict[str, Any]:
        """Contents of info.json; ``name`` is the folder's."""
        info: dict[str, Any] = {
            "@context": "http://iiif.io/api/image/3/context.json",
            "id": f"{self.options.url.rstrip('/')}/{quote(name)}",
            "type": "ImageService3",
            "protocol": "http://iiif.io/api/image",
            "profile": "level0",
            "width": self.tiles.view.width,
            "height": self.tiles.view.height,
            "sizes": [
                {"width": level.width, "height": level.height}
                for index, level in reversed(list(enumerate(self.tiles.view.levels)))
                if len(self.tiles.grid(index)) == 1
            ],
            "tiles": [
                {"width": self.options.tile, "scaleFactors": [2**index for index in range(len(self.tiles.view.levels))]}
            ],
        }
        if self.tiles.suffix != "jpg":
            info |= {"preferredFormats": [self.tiles.suffix], "extraFormats": [self.tiles.suffix]}
        return info

    def _name(self, level: int, box: Box) -> str:
        size = self.tiles.view.levels[level]
        region = box.scale(2**level).clip(self.tiles.view.levels[0].bounds)
        scaled = f"{box.width},{box.height}"
        if box == size.bounds:
            where, scaled = "full", "max" if level == 0 else scaled
        else:
            where = str(region)
        return f"{where}/{scaled}/0/default.{self.tiles.suffix}"


def prepare(view: View, suffix: str, values: Mapping[str, Any]) -> IiifJob:
    """Check the options against the view. Nothing is written yet. Raises UsageError."""
    options = checked_options(suffix, values)
    options.for_view(view)
    view.extend(options.tile, exact=True)
    return IiifJob(Tiles(view, options), options)


def checked_options(suffix: str, values: Mapping[str, Any]) -> IiifOptions:
    """The options of IIIF. Raises UsageError for one that is unknown, out of range, or contradicts another."""
    return parse_options(IiifOptions, values, suffix)


def view_depth(suffix: str, depth: int | None) -> int:
    """Bits per channel that are read: browsers show 8."""
    return 8


def check_size(suffix: str, width: int, height: int) -> None:
    """Accept any size."""
