"""Draw docs/how.svg, the picture of a render by bands in the README: ``python docs/how.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

DONE, BAND, LATER, EDGE = "#9dbbd8", "#e8893c", "#f1f3f5", "#5b6570"
BOTTOM = 0.5
"""Height of the images' lower edge."""


def image(axes: Axes, x: float, width: float, height: float, title: str, note: str, done: float, band: float) -> None:
    """An image whose upper part, a share ``done`` of its rows, is finished, and the ``band`` of rows below it."""
    top = BOTTOM + height
    axes.add_patch(Rectangle((x, BOTTOM), width, height, facecolor=LATER, edgecolor=EDGE))
    axes.add_patch(Rectangle((x, top - done * height), width, done * height, facecolor=DONE, edgecolor="none"))
    axes.add_patch(Rectangle((x, top - (done + band) * height), width, band * height, facecolor=BAND, edgecolor="none"))
    axes.add_patch(Rectangle((x, BOTTOM), width, height, facecolor="none", edgecolor=EDGE))
    axes.text(x + width / 2, top + 0.12, title, ha="center", va="bottom", fontsize=9.5, weight="bold")
    axes.text(x + width / 2, BOTTOM - 0.12, note, ha="center", va="top", fontsize=8.5, color=EDGE)


def arrow(axes: Axes, start: float, end: float, label: str) -> None:
    y = BOTTOM + 0.45
    axes.add_patch(FancyArrowPatch((start, y), (end, y), arrowstyle="-|>", mutation_scale=12, color=EDGE))
    axes.text((start + end) / 2, y + 0.1, label, ha="center", va="bottom", fontsize=9, color=EDGE)


def draw(path: Path) -> None:
    figure = Figure(figsize=(10, 3), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(0, 3))
    axes.axis("off")
    image(axes, 0.55, 0.9, 0.68, "step 1", "base image, 272x208\nwhole in memory", 1.0, 0.0)
    arrow(axes, 1.6, 2.3, "x4")
    image(axes, 2.45, 1.45, 1.1, "step 2", "a band of 16 rows\nin memory", 0.42, 0.08)
    arrow(axes, 4.05, 4.7, "x4")
    image(axes, 4.85, 2.5, 1.88, "step 3", "4096x3072: one row of shards\nin memory", 1 / 3, 0.045)
    for k in (1, 2, 3):
        axes.plot([4.85 + k * 0.625] * 2, [BOTTOM, BOTTOM + 1.88], color=EDGE, linewidth=0.6)
    for k in (1, 2):
        axes.plot([4.85, 7.35], [BOTTOM + k * 1.88 / 3] * 2, color=EDGE, linewidth=0.6)
    arrow(axes, 7.5, 8.15, "write")
    for k, (width, height) in enumerate(((1.3, 0.98), (0.65, 0.49), (0.33, 0.25))):
        bottom = BOTTOM + (0, 1.1, 1.71)[k]
        axes.add_patch(Rectangle((8.95 - width / 2, bottom), width, height, facecolor=DONE, edgecolor=EDGE))
    axes.text(8.95, BOTTOM + 2.08, "OME-Zarr store", ha="center", va="bottom", fontsize=9.5, weight="bold")
    axes.text(
        8.95, BOTTOM - 0.12, "pyramid on disk, exported\nto TIFF, PNG, JPEG, WebP", ha="center", va="top", fontsize=8.5, color=EDGE
    )  # fmt: skip
    for x, colour, text in ((0.55, DONE, "finished"), (1.55, BAND, "computed now"), (2.95, LATER, "not yet computed")):
        axes.add_patch(Rectangle((x, 2.72), 0.16, 0.13, facecolor=colour, edgecolor=EDGE, linewidth=0.6))
        axes.text(x + 0.23, 2.785, text, va="center", fontsize=8.5, color=EDGE)
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    with mpl.rc_context({"svg.hashsalt": "how", "svg.fonttype": "path"}):
        draw(Path(__file__).with_suffix(".svg"))
