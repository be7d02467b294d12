"""Checkerboard artefacts in numbers: what of a picture has the period of the squares that an enlargement makes of one pixel.

    python benchmarks/bench_checkerboard.py [MODEL PHOTO] ...

Renders samples of 1024x540 and 4096x2160, three seeds each, and takes the steps between neighbouring pixels, across and down.

`across`, `down`: their mean size by their place in the squares (the last one leads to the next square), divided by the mean of
all. 1 is even. `pattern`: of windows of 8 x 8 squares, the mean square of the part that repeats with the period 2, 3, ... 6 over
what chance leaves of steps that do not repeat; neighbouring steps are alike, therefore values are to be compared with other
periods and with the photograph, not with 1. The mean and the 99th percentile over the windows that hold any texture.

The photograph itself stands beside the samples (JPEG has a faint grid of 8 pixels). Writes results/checkerboard.csv.
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
SIZES = ((540, 1024), (2160, 4096))
PERIODS = (2, 3, 4, 5, 6)
SQUARES = 8
FAINT = 0.3  # squared levels: less than the rounding of pixels makes
PHOTO = PHOTOS / "picosdeeuropa-crop.jpg"


def differences(image):
    """What lies between neighbouring pixels of an image (H, W), across and down."""
    return [np.diff(image, axis=axis) for axis in (1, 0)]


def phases(image, period):
    """The mean size of the steps at each phase over the mean of all, across and down, of an image (H, W) -> (2, period)."""
    found = []
    for axis, step in zip((1, 0), differences(image), strict=True):
        sizes = np.abs(step).mean(1 - axis)
        means = np.array([sizes[phase::period].mean() for phase in range(period)])
        found.append(means / means.mean())
    return np.array(found)


def repetition(image, period):
    """For every window of an image (H, W) with any texture, across and down: the energy that repeats over that by chance."""
    found = []
    for step in differences(image):
        side = SQUARES * period
        rows, columns = (n // side for n in step.shape)
        windows = step[: rows * side, : columns * side].reshape(rows, SQUARES, period, columns, SQUARES, period)
        windows = windows.transpose(0, 3, 1, 4, 2, 5).reshape(rows * columns, SQUARES**2, period, period)
        energy, pattern = windows.var((1, 2, 3)), windows.mean(1).var((1, 2))
        seen = energy > FAINT
        found.append(pattern[seen] / energy[seen] * SQUARES**2)
    return np.concatenate(found)


def show(row, images, scale):
    even = np.mean([phases(image, scale) for image in images], axis=0)
    row["images"] = len(images)
    for name, values in zip(("across", "down"), even, strict=True):
        row[name] = " ".join(f"{value:.2f}" for value in values)
    for period in PERIODS:
        found = np.concatenate([repetition(image, period) for image in images])
        row[f"pattern {period}"] = f"{found.mean():.2f} {np.percentile(found, 99):.2f}"
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    add_row("checkerboard", row)


def main(*paths):
    for path, photo in zip(paths[::2], paths[1::2], strict=True):
        model = load(path)
        for size, stage in zip(SIZES, model.manifest.stages, strict=False):
            images = [render(model, Request(size=size, seed=seed)).mean(0, dtype=np.float32) for seed in SEEDS]
            show({"of": Path(path).stem, "width": size[1]}, images, stage.scale)
        image = np.asarray(Image.open(photo).convert("RGB"), dtype=np.float32).mean(2)
        show({"of": Path(photo).name, "width": image.shape[1]}, [image], stage.scale)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [str(DEFAULT), str(PHOTO)]))
