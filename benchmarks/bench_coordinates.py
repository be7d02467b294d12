"""Effect of vertical coordinates in step 1: fifty samples of two structures that differ in nothing else.

    engine train structure PHOTO --ema 0 --iterations ... --out with.safetensors
    engine train structure PHOTO --ema 0 --iterations ... --no-coordinates --out without.safetensors
    python benchmarks/bench_coordinates.py PHOTO with.safetensors without.safetensors

Columns: distance of the samples' vertical colour profile to the photograph's; diversity (deviation of a pixel over samples,
divided by the photograph's own, as in SinGAN); RMS difference of pairs; distance of the distributions of 7x7 patches to the
photograph's. Appends to results/coordinates.csv and writes docs/coordinates.jpg: 25 samples with, 25 without.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from harness import publish
from PIL import Image

from engine.io.photo import open_photo
from engine.metrics.layout import colour_profile_distance, diversity, pairwise_rms
from engine.model.structure_file import read_structure
from engine.training.losses.texture import SlicedWasserstein
from engine.training.photo import pyramid

SAMPLES, SIDE = 50, 5


def samples(structure):
    """Samples [3, H, W] in [0, 1], one for each seed."""
    images = []
    for seed in range(SAMPLES):
        generator = torch.Generator().manual_seed(seed)
        images.append(structure.sample(lambda m, shape, g=generator: torch.randn(shape, generator=g)))
    return images


def patches(images, photograph):
    """Sliced Wasserstein distance at two scales, averaged over samples."""
    distance = SlicedWasserstein(projections=256)
    return statistics.mean(
        float(distance(one[None], photograph[None], torch.Generator().manual_seed(1))) for one in images
    )


def sheet(images):
    rows = [torch.cat(images[SIDE * i : SIDE * (i + 1)], 2) for i in range(SIDE)]
    return torch.nn.functional.avg_pool2d(torch.cat(rows, 1), 2)


def main(photo, with_path, without_path):
    sheets = []
    for name, path in (("with", with_path), ("without", without_path)):
        structure = read_structure(Path(path)).eval()
        assert structure.config.coordinates == (name == "with")
        photograph = (pyramid(open_photo(Path(photo)), [structure.base_size])[0][0] + 1) / 2
        images = samples(structure)
        row = {
            "coordinates": name,
            "iterations": " ".join(map(str, structure.provenance["iterations"])),
            "samples": SAMPLES,
            "profile": f"{statistics.mean(colour_profile_distance(one, photograph) for one in images):.2f}",
            "diversity": f"{diversity(images, photograph):.3f}",
            "pairs_rms": f"{pairwise_rms(images):.2f}",
            "patches": f"{patches(images, photograph):.4f}",
        }
        publish("coordinates", row)
        sheets.append(sheet(images))
    gap = torch.ones(3, sheets[0].shape[1], 16)
    both = torch.cat([sheets[0], gap, sheets[1]], 2).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    Image.fromarray(both.numpy()).save(Path(__file__).parent.parent / "docs" / "coordinates.jpg", quality=88)


if __name__ == "__main__":
    main(*sys.argv[1:])
