"""Texture energy of a model's images relative to the photograph, octave by octave.

    python benchmarks/bench_spectrum.py MODEL PHOTO [MODEL PHOTO ...]

Renders 4096 columns with the photograph's proportions: three samples (``samples``), and the photograph reduced to step 1's size
(``reduced``), whose content is the photograph's, so that differences come from the enlargements alone. For each, the energy of
structures of 16 to 32, 8 to 16, 4 to 8 and 2 to 4 pixels over that of the photograph at this size; 1 is equal. Much energy in
coarse octaves and little in fine ones looks painted. A photograph of fewer than 4096 columns has little in the last octave
itself. Appends to results/spectrum.csv.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from harness import add_row, render
from PIL import Image

from engine.io.photo import open_photo
from engine.model.bundle import load
from engine.plan.request import Request
from engine.training.photo import open_picture

SEEDS = range(3)
WIDTH = 4096
PERIODS = (32, 16, 8, 4, 2)  # pixels


def power(image):
    """Energy at each frequency of an image [3, H, W] in grey, and the frequencies down and across in 1 / pixels."""
    grey = image.mean(0, dtype=np.float64)
    window = np.hanning(grey.shape[0])[:, None] * np.hanning(grey.shape[1])
    energy = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    down, across = np.broadcast_arrays(np.fft.fftfreq(grey.shape[0])[:, None], np.fft.fftfreq(grey.shape[1]))
    return energy, down, across


def energies(image):
    """Energy of an image [3, H, W] in each octave."""
    energy, down, across = power(image)
    frequency = np.maximum(np.abs(down), np.abs(across))
    octaves = ((frequency >= 1 / low) & (frequency < 1 / high) for low, high in pairwise(PERIODS))
    return np.array([energy[octave].sum() for octave in octaves])


def photograph(photo, size, folder):
    """The photograph [3, H, W] at this size, reduced as for training."""
    return open_picture(photo, size, folder / "pixels").crop(0, 0, *size).numpy()


def show(name, kind, values, images):
    row = {"model": name, "of": kind, "images": images}
    row |= {f"{high} to {low} px": f"{value:.2f}" for (low, high), value in zip(pairwise(PERIODS), values, strict=True)}
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    add_row("spectrum", row)


def main(*paths):
    for path, picture in zip(paths[::2], paths[1::2], strict=True):
        model, photo = load(path), open_photo(Path(picture))
        size = (round(WIDTH * photo.height / photo.width), WIDTH)
        sampled = [energies(render(model, Request(size=size[::-1], seed=seed))) for seed in SEEDS]
        base = model.base_size[1]
        small = (round(base * photo.height / photo.width), base)
        enlarged = (small[0] * WIDTH // base, WIDTH)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            start = folder / "reduced.png"
            Image.fromarray(np.moveaxis(photograph(photo, small, folder), 0, -1)).save(start)
            reduced = energies(render(model, Request(size=enlarged[::-1], init=start)))
            truths = [energies(photograph(photo, one, folder)) for one in (size, enlarged)]
        show(Path(path).stem, "samples", np.mean(sampled, 0) / truths[0], len(sampled))
        show(Path(path).stem, "reduced", reduced / truths[1], 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
