"""What a value of step 1's recipe does: fifty samples of each of some structures, or models.

    engine train preset quick > one.toml                      # edit a value of [structure], such as ema or texture
    engine train structure PHOTO --config one.toml --out one.safetensors
    engine train structure PHOTO --preset quick --out other.safetensors
    python benchmarks/bench_structure.py PHOTO one.safetensors other.safetensors

The measures of bench_coordinates.py, and the share of pixels whose colour, in steps of 16 levels, the photograph does not
have at all. Writes results/structure.csv.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from bench_coordinates import SAMPLES, patches, samples
from harness import add_row

from engine.metrics.layout import colour_profile_distance, diversity
from engine.model import open_structure
from engine.training.data import open_photo, pyramid

STEP = 16


def colours(image):
    """The bin of every pixel of [3, H, W] in [0, 1]."""
    red, green, blue = (image.clamp(0, 1) * 255).round().long() // STEP
    return (red * STEP + green) * STEP + blue


def main(photo, *paths):
    for path in paths:
        structure = open_structure(Path(path)).eval()
        photograph = (pyramid(open_photo(Path(photo)), [structure.base_size])[0][0] + 1) / 2
        known = torch.zeros(STEP**3, dtype=torch.bool)
        known[colours(photograph).unique()] = True
        found = samples(structure)
        row = {
            "photo": Path(photo).name,
            "ema": structure.facts.get("ema", 0.0),
            "last_vae": structure.config.last_vae,
            "texture": structure.facts.get("texture", 0.0),
            "feature_texture": structure.facts.get("feature_texture", 0.0),
            "discriminator": structure.facts.get("discriminator", "wgan"),
            "iterations": " ".join(map(str, structure.facts["iterations"])),
            "samples": SAMPLES,
            "profile": f"{statistics.mean(colour_profile_distance(one, photograph) for one in found):.2f}",
            "diversity": f"{diversity(found, photograph):.3f}",
            "patches": f"{patches(found, photograph):.4f}",
            "foreign": f"{statistics.mean(float((~known[colours(one)]).float().mean()) for one in found):.4f}",
        }
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        add_row("structure", row)


if __name__ == "__main__":
    main(*sys.argv[1:])
