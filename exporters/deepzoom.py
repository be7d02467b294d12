"""Deep Zoom: ``NAME.dzi`` and a folder ``NAME_files`` of tiles for any web server, or both in one ZIP archive.

Every viewer of the family reads it: OpenSeadragon, OpenLayers, Leaflet. Levels go down to one pixel, as the format demands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.exporters.job import Progress
from engine.exporters.place import DeepZoomPlace, stem_of
from engine.exporters.tiles import FolderSink, TileOptions, Tiles, ZipSink, new_archive, tile_options
from engine.exporters.view import View
from engine.geometry import Box

_ARCHIVE = ".zip"

_DESCRIPTOR = """<?xml version="1.0" encoding="UTF-8"?>
<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="{suffix}" Overlap="0" TileSize="{tile}">
  <Size Width="{width}" Height="{height}"/>
</Image>
"""


@dataclass(frozen=True, slots=True)
class DeepZoomJob:
    """A checked export to Deep Zoom."""

    tiles: Tiles
    is_archive: bool
    notes: tuple[str, ...] = ()

    @property
    def estimate(self) -> int:
        return self.tiles.estimate

    def write(self, path: Path, on_progress: Progress) -> None:
        """Write the tiles and, at the end, the descriptor, under the name of ``path``."""
        stem = stem_of(path.name, DeepZoomPlace.SUFFIX)
        if not self.is_archive:
            self._write(FolderSink(path.parent), stem, path.name, on_progress)
            return
        with new_archive(path) as archive:
            self._write(ZipSink(archive), stem, f"{stem}.dzi", on_progress)

    def _write(self, sink: FolderSink | ZipSink, stem: str, descriptor: str, on_progress: Progress) -> None:
        side, suffix, last = self.tiles.options.tile, self.tiles.suffix, len(self.tiles.view.levels) - 1

        def name(level: int, box: Box) -> str:
            return f"{stem}_files/{last - level}/{box.x0 // side}_{box.y0 // side}.{suffix}"

        self.tiles.write(sink, name, on_progress)
        view = self.tiles.view
        text = _DESCRIPTOR.format(suffix=suffix, tile=side, width=view.width, height=view.height)
        sink.collect([sink.put(descriptor, text.encode())])


def prepare(view: View, suffix: str, values: Mapping[str, Any]) -> DeepZoomJob:
    """Check the options against the view. Nothing is written yet. Raises UsageError."""
    options = checked_options(suffix, values)
    options.for_view(view)
    view.extend(1, exact=True)
    return DeepZoomJob(Tiles(view, options), suffix.endswith(_ARCHIVE))


def checked_options(suffix: str, values: Mapping[str, Any]) -> TileOptions:
    """The options of Deep Zoom. Raises UsageError for one that is unknown, out of range, or contradicts another."""
    return tile_options(suffix, values)


def view_depth(suffix: str, depth: int | None) -> int:
    """Bits per channel that are read: browsers show 8."""
    return 8


def check_size(suffix: str, width: int, height: int) -> None:
    """Accept any size."""
