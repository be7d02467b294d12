"""Effect of fine-tuning on the strip of the photograph that training never saw: bicubic, start weights, fine-tuned weights.

    python benchmarks/bench_finetuning.py PHOTO START WEIGHTS NAME [INDEX] [--vgg FILE]

START and WEIGHTS are weights files of one step, names of packaged weights, or models whose stage INDEX (from 0) is taken.
WEIGHTS records the size of the photograph and the input noise.

Columns: PSNR, the distance of the distributions of 7x7 patches and, with --vgg (VGG-16), two perceptual distances. ``pointwise``
is the mean squared difference of unit-length feature vectors at the same place, averaged over five layers: LPIPS with equal
weights instead of learned heads (Zhang et al. 2018, "baseline"). ``frechet`` is the Frechet distance of the vectors' distributions
at relu4_3, as in SIFID, divided by the photograph's own variance there.

Appends a row for each to results/finetuning.csv and writes docs/finetuning-NAME.jpg: three crops, each as bicubic, start,
fine-tuned and photograph.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import publish
from PIL import Image
from torch.nn import functional as F

from engine.io.photo import open_photo
from engine.metrics.frechet import Moments, frechet_distance
from engine.model.build import read_stage
from engine.run.stage import Stage
from engine.training.losses.vgg import open_vgg
from engine.training.photo import open_picture
from engine.training.sr.degradations import bicubic
from engine.training.sr.networks import Shape, open_start
from engine.training.sr.validation import Validation, fixed_crops

LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
DOCS = Path(__file__).parent.parent / "docs"


@torch.no_grad()
def pointwise(vgg, ours, truth):
    """Mean of |a / |a| - b / |b||^2 over layers, positions and crops."""
    distances = []
    for a, b in zip(torch.split(ours, 1), torch.split(truth, 1), strict=True):
        a, b = vgg(a), vgg(b)
        distances += [(F.normalize(a[layer]) - F.normalize(b[layer])).square().sum(1).mean() for layer in LAYERS]
    return float(torch.stack(distances).mean())


@torch.no_grad()
def frechet(vgg, ours, truth, layer="relu4_3"):
    """Frechet distance of the vectors of all crops together, relative to the variance of ``truth``."""
    gaussians = []
    for pictures in (ours, truth):
        moments = Moments(512)
        for one in torch.split(pictures, 1):
            moments.add(vgg(one)[layer])
        gaussians.append(moments.gaussian())
    return frechet_distance(*gaussians) / float(np.trace(gaussians[1].covariance))


def enlarger(network):
    stage = Stage(network.eval().requires_grad_(False), torch.device("cpu"), "fp32")
    return lambda lr: torch.cat([stage.run(one).clamp(0, 1) for one in torch.split(lr, 1)])


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("photo", "start", "weights", "name"):
        parser.add_argument(name)
    parser.add_argument("index", type=int, nargs="?", default=0)
    parser.add_argument("--vgg", type=Path)
    return parser.parse_args()


def main():
    arguments = parse()
    facts = read_stage(arguments.weights, arguments.index)[1].training
    start, tuned = (open_start(name, Shape(), 0, arguments.index) for name in (arguments.start, arguments.weights))
    width, height = facts["photo"]["trained_at"]
    vgg = open_vgg(arguments.vgg, LAYERS) if arguments.vgg else None
    with tempfile.TemporaryDirectory() as folder:
        picture = open_picture(open_photo(Path(arguments.photo)), (height, width), Path(folder) / "photo")
        trained = width - int(width * facts["recipe"]["held_out"])
        hr, held_out = fixed_crops(picture, trained, 4 * tuned.network.align)
    assert held_out
    validation = Validation(hr, bicubic(hr, 4), tuned.sigma, tuned.network.noise_channels, held_out)
    outputs = {
        "bicubic": F.interpolate(validation.lr, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1),
        "start": enlarger(start.network)(validation.lr),
        "fine-tuned": enlarger(tuned.network)(validation.inputs(noise=True)),
    }
    for way, pictures in outputs.items():
        quality = validation.quality(lambda lr, pictures=pictures: pictures, noise=False)
        row = {"name": arguments.name, "step": facts["step"], "crops": len(hr), "way": way}
        row |= {"psnr": f"{quality.psnr:.2f}", "patches": f"{quality.texture:.4f}"}
        row["pointwise"] = f"{pointwise(vgg, pictures, hr):.4f}" if vgg else ""
        row["frechet"] = f"{frechet(vgg, pictures, hr):.4f}" if vgg else ""
        publish("finetuning", row)
    columns = [torch.cat(list(pictures[[1, len(hr) // 2, -2]]), 1) for pictures in (*outputs.values(), hr)]
    sheet = torch.cat(columns, 2).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(sheet)).save(DOCS / f"finetuning-{arguments.name}.jpg", quality=92)


if __name__ == "__main__":
    main()
