"""Crops of a sample at full size, before and after fine-tuning, beside the photograph.

    python benchmarks/crops.py PHOTO NAME X,Y [X,Y ...]

The sample is seed 7 of models/NAME.safetensors at 4096 columns. Each place X,Y is shown with RealSR-DF2K in all steps (before),
with the model's own networks (after), and in the photograph enlarged to the same width. Writes docs/crops-NAME.jpg.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import render
from PIL import Image

import engine
from engine.geometry import Box
from engine.model.build import build
from engine.model.structure_file import write_structure

ROOT = Path(__file__).parent.parent
SIDE, WIDTH, GAP = 384, 4096, 8


def crop(model, place):
    """Crop [SIDE, SIDE, 3] of the sample, rendered alone."""
    base_height, base_width = model.base_size
    size = (WIDTH, base_height * WIDTH // base_width)
    roi = Box(place[1], place[0], place[1] + SIDE, place[0] + SIDE)
    return np.moveaxis(render(model, engine.Request(size=size, seed=7, roi=roi, precision="fp32", overlap="32")), 0, -1)


def main(photo, name, *places):
    after = engine.load(ROOT / "models" / f"{name}.safetensors")
    photograph = Image.open(photo)
    photograph = photograph.resize(
        (WIDTH, round(photograph.height * WIDTH / photograph.width)), Image.Resampling.BICUBIC
    )
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_structure(after.base_generator, folder / "structure.safetensors")
        before = build(folder / "structure.safetensors", ["realsr"] * len(after.stages), margin=after.manifest.margin)
        for text in places:
            x, y = (int(n) for n in text.split(","))
            truth = np.asarray(photograph.crop((x, y, x + SIDE, y + SIDE)))
            rows.append([crop(before, (x, y)), crop(after, (x, y)), truth])
    step = SIDE + GAP
    sheet = np.full((step * len(rows) - GAP, step * 3 - GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for k, picture in enumerate(row):
            sheet[i * step : i * step + SIDE, k * step : k * step + SIDE] = picture
    Image.fromarray(sheet).save(ROOT / "docs" / f"crops-{name}.jpg", quality=92)


if __name__ == "__main__":
    main(*sys.argv[1:])
