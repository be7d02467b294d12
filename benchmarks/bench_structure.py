"""Effect of a value of step 1's recipe: measures of fifty samples of each structure file or model.

    engine train preset quick > one.toml                      # edit a value of [structure], such as sigma or texture
    engine train structure PHOTO --config one.toml --out one.safetensors
    engine train structure PHOTO --preset quick --out other.safetensors
    python benchmarks/bench_structure.py PHOTO one.safetensors other.safetensors [--vgg FILE]

Columns in addition to those of bench_coordinates.py:

* foreign: share of pixels with a colour, in steps of 16 levels, that the photograph does not have;
* chance: change by the last scale's noise, relative to the whole change by this scale;
* hatching: energy of structures of 2 to 4 pixels relative to the photograph's, in the strongest of four directions;
* vae_contrast and vae_patches: contrast relative to the photograph's, and patches, of the last patch-VAE's samples;
* frechet, with weights of VGG-16: Frechet distance of feature vectors (as in bench_finetuning.py) at relu5_3, a layer that
  no loss uses.

Writes results/structure.csv and, with --sheet FILE, an image with a row for each structure: the photograph and three samples
at twice their size.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from bench_coordinates import SAMPLES, patches, samples
from bench_finetuning import frechet
from bench_spectrum import power
from harness import publish
from PIL import Image

from engine.io.photo import open_photo
from engine.metrics.layout import colour_profile_distance, diversity
from engine.model.bundle import open_structure
from engine.training.losses.vgg import open_vgg
from engine.training.photo import pyramid
from engine.training.structure.trainer import seeded_noise

STEP, LAYER, SHOWN, GAP = 16, "relu5_3", 3, 8


def colours(image):
    """Colour bin of every pixel of [3, H, W] in [0, 1]."""
    red, green, blue = (image.clamp(0, 1) * 255).round().long() // STEP
    return (red * STEP + green) * STEP + blue


def chance(structure, seeds=4):
    """Share of the last scale's detail that its noise decides, mean over the seeds.

    The deviation between two samples that differ in this noise only, relative to the deviation from the scale below, enlarged.
    """
    last, shares = len(structure.sizes) - 1, []
    for seed in range(seeds):
        usual, others = seeded_noise(seed), seeded_noise(seed + seeds)
        a = structure.sample(usual)
        b = structure.sample(lambda m, shape, n=usual, o=others: (o if m == last else n)(m, shape))
        below = structure.sample(usual, last=last - 1)[None]
        detail = a - torch.nn.functional.interpolate(below, a.shape[1:], mode="bilinear", align_corners=True)[0]
        shares.append(float((a - b).std() / 2**0.5 / detail.std()))
    return statistics.mean(shares)


def hatching(images, photograph):
    """Largest ratio over the four directions of the samples' mean energy to the photograph's."""
    energies = np.mean([directions(one) for one in images], 0)
    return float((energies / directions(photograph)).max())


def directions(image):
    """Energy of [3, H, W] at periods of 2 to 4 pixels: across, down and along both diagonals, each +- 22.5 degrees."""
    energy, down, across = power(image.numpy())
    frequency, angle = np.hypot(down, across), np.degrees(np.arctan2(down, across))
    fine = (frequency >= 1 / 4) & (frequency < 1 / 2)
    return np.array([energy[fine & ((angle - middle + 22.5) % 180 < 45)].sum() for middle in (0, 45, 90, 135)])


def first_samples(structure, photo):
    """Contrast of the last patch-VAE's samples relative to the photograph's, and the distance of their patches."""
    scale = structure.config.last_vae
    images = [structure.sample(seeded_noise(seed), last=scale) for seed in range(SAMPLES)]
    photograph = (pyramid(photo, [structure.sizes[scale]])[0][0] + 1) / 2
    return statistics.mean(float(one.std() / photograph.std()) for one in images), patches(images, photograph)


def write_sheet(rows, path):
    cells = [[torch.nn.functional.pad(one, (0, GAP, 0, GAP), value=1.0) for one in row] for row in rows]
    sheet = torch.cat([torch.cat(row, 2) for row in cells], 1)
    Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy()).save(path, quality=90)


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("photo")
    words.add_argument("paths", nargs="+")
    words.add_argument("--vgg", type=Path)
    words.add_argument("--sheet", type=Path)
    arguments, rows = words.parse_args(), []
    photo, vgg = open_photo(Path(arguments.photo)), open_vgg(arguments.vgg, (LAYER,)) if arguments.vgg else None
    for path in arguments.paths:
        structure = open_structure(Path(path)).eval()
        photograph = (pyramid(photo, [structure.base_size])[0][0] + 1) / 2
        present = torch.zeros(STEP**3, dtype=torch.bool)
        present[colours(photograph).unique()] = True
        images = samples(structure)
        rows.append([one.repeat_interleave(2, 1).repeat_interleave(2, 2) for one in (photograph, *images[:SHOWN])])
        row = {
            "photo": Path(arguments.photo).name,
            "ema": structure.provenance.get("ema", 0.0),
            "last_vae": structure.config.last_vae,
            "texture": structure.provenance.get("texture", 0.0),
            "feature_texture": structure.provenance.get("feature_texture", 0.0),
            "sigma": structure.provenance.get("sigma", 0.05),
            "discriminator": structure.provenance.get("discriminator", "wgan"),
            "iterations": " ".join(map(str, structure.provenance["iterations"])),
            "samples": SAMPLES,
            "profile": f"{statistics.mean(colour_profile_distance(one, photograph) for one in images):.2f}",
            "diversity": f"{diversity(images, photograph):.3f}",
            "patches": f"{patches(images, photograph):.4f}",
            "foreign": f"{statistics.mean(float((~present[colours(one)]).float().mean()) for one in images):.4f}",
        }
        row["chance"] = f"{chance(structure):.2f}"
        distances = [frechet(vgg, one[None], photograph[None], LAYER) for one in images] if vgg else []
        row["frechet"] = f"{statistics.mean(distances):.4f}" if distances else ""
        contrast, first = first_samples(structure, photo)
        row |= {name: structure.provenance.get(name, 0.0) for name in ("vae_texture", "vae_coherence", "detail")}
        row |= {"vae_contrast": f"{contrast:.2f}", "vae_patches": f"{first:.4f}"}
        row["hatching"] = f"{hatching(images, photograph):.2f}"
        publish("structure", row)
    if arguments.sheet:
        write_sheet(rows, arguments.sheet)


if __name__ == "__main__":
    main()
