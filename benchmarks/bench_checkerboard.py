"""Checkerboard artefacts: structures with the period of the squares that an enlargement makes of one pixel.

    python benchmarks/bench_checkerboard.py [MODEL PHOTO] ...

Renders samples of 1024x540 and 4096x2160, three seeds each, and takes the differences of neighbouring pixels, across and down.

``across``, ``down``: mean absolute difference by position in the square (the last one leads to the next square), divided by the
mean over all positions. 1 is even.

``pattern``: for windows of 8 x 8 squares, the energy of the part that repeats with the period 2, 3, ... 6, relative to that
expected of differences that do not repeat. Neighbouring differences are correlated, so compare a value with other periods and
with the photograph, not with 1. Given as the mean and the 99th percentile over the windows with any texture.

The photograph itself is measured beside the samples (JPEG has a faint grid of 8 pixels). Appends to results/checkerboard.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from harness import PHOTOS, add_row, render
from PIL import Image

from engine.model.bundle import DEFAULT, load
from engine.plan.request import Request

SEEDS = range(3)
SIZES = ((1024, 540), (4096, 2160))
PERIODS = (2, 3, 4, 5, 6)
SQUARES = 8
FAINT = 0.3
"""Energy in squared levels below which a window has no texture; rounding of pixels makes more."""

PHOTO = PHOTOS / "picosdeeuropa-crop.jpg"


def differences(image):
    """Differences of neighbouring pixels of an image [H, W], across and down."""
    return [np.diff(image, axis=axis) for axis in (1, 0)]


def phases(image, period):
    """Mean absolute difference at each phase over the mean of all phases, across and down: [H, W] -> [2, period]."""
    ratios = []
    for axis, step in zip((1, 0), differences(image), strict=True):
        sizes = np.abs(step).mean(1 - axis)
        means = np.array([sizes[phase::period].mean() for phase in range(period)])
        ratios.append(means / means.mean())
    return np.array(ratios)


def repetition(image, period):
    """Repeating energy over the energy by chance, for every textured window of an image [H, W], across and down."""
    ratios = []
    for step in differences(image):
        side = SQUARES * period
        rows, columns = (n // side for n in step.shape)
        windows = step[: rows * side, : columns * side].reshape(rows, SQUARES, period, columns, SQUARES, period)
        windows = windows.transpose(0, 3, 1, 4, 2, 5).reshape(rows * columns, SQUARES**2, period, period)
        energy, pattern = windows.var((1, 2, 3)), windows.mean(1).var((1, 2))
        textured = energy > FAINT
        ratios.append(pattern[textured] / energy[textured] * SQUARES**2)
    return np.concatenate(ratios)


def show(row, images, scale):
    even = np.mean([phases(image, scale) for image in images], axis=0)
    row["images"] = len(images)
    for name, values in zip(("across", "down"), even, strict=True):
        row[name] = " ".join(f"{value:.2f}" for value in values)
    for period in PERIODS:
        ratios = np.concatenate([repetition(image, period) for image in images])
        row[f"pattern {period}"] = f"{ratios.mean():.2f} {np.percentile(ratios, 99):.2f}"
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    add_row("checkerboard", row)


def main(*paths):
    for path, photo in zip(paths[::2], paths[1::2], strict=True):
        model = load(path)
        for size, stage in zip(SIZES, model.manifest.stages, strict=False):
            images = [render(model, Request(size=size, seed=seed)).mean(0, dtype=np.float32) for seed in SEEDS]
            show({"of": Path(path).stem, "width": size[0]}, images, stage.scale)
        image = np.asarray(Image.open(photo).convert("RGB"), dtype=np.float32).mean(2)
        show({"of": Path(photo).name, "width": image.shape[1]}, [image], stage.scale)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(DEFAULT), str(PHOTO)]))
