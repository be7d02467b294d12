"""Tiles with ``--overlap exact`` compared with the whole image: full-size networks, float32.

    python benchmarks/bench_exact.py

Question: is the theoretical receptive field a sufficient halo? The pictures are long and narrow, so that tiles are cut although
the halo is 349 (RRDBNet, RealSR-DF2K weights) or 160 pixels (SwinIR-M, amplified random weights). Writes results/exact.csv.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from harness import PHOTOS, publish

from engine import archs
from engine.archs.swinir import SwinIR
from engine.geometry import Box
from engine.io.photo import PictureSource, TensorSource
from engine.kernels.gather import gather
from engine.model.checkpoints import read_checkpoint
from engine.model.packaged import find_packaged
from engine.plan.stage import StagePlan
from engine.run.pipeline import tile_chain
from engine.run.stage import Stage

CASES = {"RRDBNet 64x23": ((767, 17), (48, 64)), "SwinIR-M": ((391, 21), (24, 48))}


def networks():
    yield "RRDBNet 64x23", archs.build(read_checkpoint(find_packaged("realsr")))
    torch.manual_seed(0)
    swinir = SwinIR()
    for name, parameter in swinir.named_parameters():
        # Attention of an untrained network is nearly uniform; amplified weights make a wrong window visible.
        if "qkv.weight" in name or "relative_position_bias_table" in name:
            parameter.data *= 4 if "qkv" in name else 20
    yield "SwinIR-M", swinir.eval().requires_grad_(False)


def whole_image(stage, image):
    """Reference: the frame padded once to the window, run in one piece and cropped."""
    height, width = image.shape[1:]
    padded = (-(-n // stage.align) * stage.align for n in (height, width))
    output = stage.run(gather(image, Box(0, 0, height, width), Box(0, 0, *padded), (height, width)))[0]
    return output[:, : height * stage.scale, : width * stage.scale].clamp(0, 1)


def tiled(stage, image, tile, folder):
    """Output in tiles with an exact halo, and the cut."""
    halo = -(-stage.radius // stage.align) * stage.align
    height, width = image.shape[1:]
    cut = StagePlan(
        step=2, height=height, width=width, scale=stage.scale, align=stage.align, halo=halo, tile=tile, sigma=0.0
    )
    (level,) = tile_chain([cut], [stage], TensorSource(image), seed=0, scratch=folder, cache_bytes=1 << 30)
    return level.read(Box(0, 0, *level.size)), cut


def main():
    photo = PictureSource(PHOTOS / "picosdeeuropa-crop.jpg")
    tall = torch.cat([photo.read(Box(0, x, 576, x + 32)) for x in (0, 300)], 1)  # [3, 1152, 32]
    with tempfile.TemporaryDirectory() as name:
        for title, network in networks():
            stage = Stage(network, torch.device("cpu"), "fp32")
            (height, width), cores = CASES[title]
            image = tall[:, :height, :width].contiguous()
            whole = whole_image(stage, image)
            for core in cores:
                result, plan = tiled(stage, image, core, Path(name) / f"{core}")
                assert plan.tile_shape[0] < height, "the tile holds the whole image: nothing is tested"
                difference = float((result - whole).abs().max())
                eight_bit = int(((result * 255).round() != (whole * 255).round()).sum())
                row = {
                    "network": title,
                    "size": f"{width}x{height}",
                    "core": core,
                    "halo": plan.halo,
                    "tiles": len(plan.grid),
                }
                row |= {"max_difference": f"{difference:.1e}", "values": whole.numel(), "differing_8bit": eight_bit}
                publish("exact", row)


if __name__ == "__main__":
    main()
