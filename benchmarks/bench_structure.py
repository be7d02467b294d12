"""What a value of step 1's recipe does: fifty samples of each of some structures, or models.

    engine train preset quick > one.toml                      # edit a value of [structure], such as sigma or texture
    engine train structure PHOTO --config one.toml --out one.safetensors
    engine train structure PHOTO --preset quick --out other.safetensors
    python benchmarks/bench_structure.py PHOTO one.safetensors other.safetensors [--vgg FILE]

The measures of bench_coordinates.py; the share of pixels whose colour, in steps of 16 levels, the photograph does not have
at all (foreign); what the last scale's own noise changes over all that this scale changes (chance); how much energy the
structures of 2 to 4 pixels have over the photograph's, in that of four directions where it is most (hatching); and of samples
as the last patch-VAE leaves them their contrast, over the photograph's of that size, and their patches. With the weights of
VGG-16 also the Frechet distance of feature vectors, as bench_finetuning.py has it, of each sample at relu5_3, where no loss
looks. Writes results/structure.csv and with --sheet FILE a picture: a row for each structure, the photograph and three
samples, at twice their size.
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
from harness import add_row
from PIL import Image

from engine.io.photo import open_photo
from engine.metrics.layout import colour_profile_distance, diversity
from engine.model.bundle import open_structure
from engine.training.losses.vgg import open_vgg
from engine.training.photo import pyramid
from engine.training.structure.trainer import seeded_noise

STEP, LAYER, SHOWN, GAP = 16, "relu5_3", 3, 8


def colours(image):
    """The bin of every pixel of [3, H, W] in [0, 1]."""
    red, green, blue = (image.clamp(0, 1) * 255).round().long() // STEP
    return (red * STEP + green) * STEP + blue


def chance(structure, seeds=4):
    """How much of the last scale's detail is its noise's: the deviation of two samples that differ in that noise alone,
    over the deviation from the scale below, enlarged; mean over the seeds.
    """
    last, found = len(structure.sizes) - 1, []
    for seed in range(seeds):
        usual, others = seeded_noise(seed), seeded_noise(seed + seeds)
        a = structure.sample(usual)
        b = structure.sample(lambda m, shape, n=usual, o=others: (o if m == last else n)(m, shape))
        below = structure.sample(usual, last=last - 1)[None]
        detail = a - torch.nn.functional.interpolate(below, a.shape[1:], mode="bilinear", align_corners=True)[0]
        found.append(float((a - b).std() / 2**0.5 / detail.std()))
    return statistics.mean(found)


def hatching(found, photograph):
    """The largest of the ratios in the four directions, of the energies' means over the samples."""
    energies = np.mean([directions(one) for one in found], 0)
    return float((energies / directions(photograph)).max())


def directions(image):
    """The energy of [3, H, W] in periods of 2 to 4 pixels, across, down and along both diagonals, each +- 22.5 degrees."""
    energy, down, across = power(image.numpy())
    frequency, angle = np.hypot(down, across), np.degrees(np.arctan2(down, across))
    fine = (frequency >= 1 / 4) & (frequency < 1 / 2)
    return np.array([energy[fine & ((angle - middle + 22.5) % 180 < 45)].sum() for middle in (0, 45, 90, 135)])


def first_samples(structure, photo):
    """The contrast of the last patch-VAE's samples over the photograph's, and the distance of their patches."""
    scale = structure.config.last_vae
    found = [structure.sample(seeded_noise(seed), last=scale) for seed in range(SAMPLES)]
    photograph = (pyramid(photo, [structure.sizes[scale]])[0][0] + 1) / 2
    return statistics.mean(float(one.std() / photograph.std()) for one in found), patches(found, photograph)


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
    given, rows = words.parse_args(), []
    photo, vgg = open_photo(Path(given.photo)), open_vgg(given.vgg, (LAYER,)) if given.vgg else None
    for path in given.paths:
        structure = open_structure(Path(path)).eval()
        photograph = (pyramid(photo, [structure.base_size])[0][0] + 1) / 2
        known = torch.zeros(STEP**3, dtype=torch.bool)
        known[colours(photograph).unique()] = True
        found = samples(structure)
        rows.append([one.repeat_interleave(2, 1).repeat_interleave(2, 2) for one in (photograph, *found[:SHOWN])])
        row = {
            "photo": Path(given.photo).name,
            "ema": structure.provenance.get("ema", 0.0),
            "last_vae": structure.config.last_vae,
            "texture": structure.provenance.get("texture", 0.0),
            "feature_texture": structure.provenance.get("feature_texture", 0.0),
            "sigma": structure.provenance.get("sigma", 0.05),
            "discriminator": structure.provenance.get("discriminator", "wgan"),
            "iterations": " ".join(map(str, structure.provenance["iterations"])),
            "samples": SAMPLES,
            "profile": f"{statistics.mean(colour_profile_distance(one, photograph) for one in found):.2f}",
            "diversity": f"{diversity(found, photograph):.3f}",
            "patches": f"{patches(found, photograph):.4f}",
            "foreign": f"{statistics.mean(float((~known[colours(one)]).float().mean()) for one in found):.4f}",
        }
        row["chance"] = f"{chance(structure):.2f}"
        distances = [frechet(vgg, one[None], photograph[None], LAYER) for one in found] if vgg else []
        row["frechet"] = f"{statistics.mean(distances):.4f}" if distances else ""
        contrast, first = first_samples(structure, photo)
        row |= {name: structure.provenance.get(name, 0.0) for name in ("vae_texture", "vae_coherence", "detail")}
        row |= {"vae_contrast": f"{contrast:.2f}", "vae_patches": f"{first:.4f}"}
        row["hatching"] = f"{hatching(found, photograph):.2f}"
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        add_row("structure", row)
    if given.sheet:
        write_sheet(rows, given.sheet)


if __name__ == "__main__":
    main()
