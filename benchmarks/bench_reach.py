"""How far spandrel's networks look, by the engine's probe: each small and with random weights, on the middle of a photograph.

    python benchmarks/bench_reach.py                 # all, a few minutes
    python benchmarks/bench_reach.py --only HAT DAT

For each network: the radius of its trace where that streams in bands, or the reason why it does not; the operations that look at
the whole picture through a small statistic; and the effect of the far half of the picture on the other end, in levels of 255,
without and with these statistics as constants. Random weights say how a network looks, not how much: errors belong to trained ones.
"""

import argparse
from importlib import import_module

import torch
from harness import PHOTOS, add_row

from engine.archs import build, identify
from engine.archs.foreign import load_spandrel
from engine.bands.graph import radius
from engine.errors import ModelError, UsageError
from engine.geometry import Box
from engine.io.photo import PictureSource
from engine.probe.reach import FAR_LEVELS, on_picture
from engine.probe.seam import far_effect
from engine.run.stage import Stage

PHOTO = PHOTOS / "picosdeeuropa-crop.jpg"
SIDE = 128
COLUMNS = ("reach", "radius", "statistics", "grid", "far effect", "far effect, constants", "reason")

NETWORKS = {
    "ATD": (
        "ATD",
        "ATD",
        {
            "embed_dim": 12,
            "depths": (2,),
            "num_heads": (2,),
            "category_size": 64,
            "num_tokens": 8,
            "upscale": 2,
            "upsampler": "pixelshuffledirect",
        },
    ),
    "CRAFT": ("CRAFT", "CRAFT", {"depths": [2], "num_heads": [6], "upscale": 2}),
    "DAT": ("DAT", "DAT", {"embed_dim": 64, "split_size": [8, 16], "depth": [2], "num_heads": [2], "upscale": 2}),
    "DCTLSA": ("DCTLSA", "DCTLSA", {"nf": 10, "upscale": 2}),
    "DITN": ("DITN", "DITN", {"dim": 12, "ITL_blocks": 1, "SAL_blocks": 1, "upscale": 2}),
    "DRCT": (
        "DRCT",
        "DRCT",
        {"embed_dim": 12, "depths": (6,), "num_heads": (2,), "upscale": 2, "upsampler": "pixelshuffle", "gc": 8},
    ),
    "DRUNet": ("DRUNet", "DRUNet", {"in_nc": 4, "out_nc": 3, "nc": [8, 8, 8, 8], "nb": 2}),
    "DnCNN": ("DnCNN", "DnCNN", {"in_nc": 3, "out_nc": 3, "nc": 8}),
    "FBCNN": ("FBCNN", "FBCNN", {"nc": [8, 8, 8, 512], "nb": 2}),
    "FDAT": ("FDAT", "FDAT", {"embed_dim": 16, "num_groups": 1, "depth_per_group": 2, "num_heads": 2, "scale": 2}),
    "FFTformer": ("FFTformer", "FFTformer", {"dim": 8, "num_blocks": [1, 1, 1], "num_refinement_blocks": 1}),
    "GRL": (
        "GRL",
        "GRL",
        {
            "embed_dim": 16,
            "depths": [2],
            "num_heads_window": [2],
            "num_heads_stripe": [2],
            "upscale": 2,
            "upsampler": "pixelshuffledirect",
        },
    ),
    "HAT": (
        "HAT",
        "HAT",
        {
            "embed_dim": 12,
            "depths": (2,),
            "num_heads": (2,),
            "window_size": 16,
            "squeeze_factor": 3,
            "upscale": 2,
            "upsampler": "pixelshuffle",
        },
    ),
    "HVI-CIDNet": ("HVICIDNet", "HVICIDNet", {"channels": [12, 12, 24, 48]}),
    "IPT": ("IPT", "IPT", {"n_feats": 8, "num_layers": 1, "num_heads": 2, "scale": [2]}),
    "KBNet s": ("KBNet", "KBNet_s", {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}),
    "MixDehazeNet": ("MixDehazeNet", "MixDehazeNet", {"embed_dims": [8, 16, 32, 16, 8]}),
    "MM-RealSR": (
        "MMRealSR",
        "MMRealSR",
        {
            "num_in_ch": 3,
            "num_out_ch": 3,
            "num_feat": 8,
            "num_block": 1,
            "num_grow_ch": 4,
            "num_feats": [8, 8, 8, 8],
            "num_blocks": [1, 1, 1, 1],
        },
    ),
    "MoESR": ("MoESR", "MoESR", {"dim": 8, "n_blocks": 1, "n_block": 1, "scale": 2, "upsample_dim": 8}),
    "MoSR": ("MoSR", "MoSR", {"dim": 8, "n_block": 2, "upscale": 2}),
    "NAFNet": ("NAFNet", "NAFNet", {"width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}),
    "OmniSR": ("OmniSR", "OmniSR", {"num_feat": 16, "res_num": 1, "up_scale": 2}),
    "PLKSR": ("PLKSR", "PLKSR", {"dim": 8, "n_blocks": 2, "upscaling_factor": 2}),
    "RealPLKSR": ("PLKSR", "RealPLKSR", {"dim": 16, "n_blocks": 3, "upscaling_factor": 2}),
    "RealPLKSR, layer norm": (
        "PLKSR",
        "RealPLKSR",
        {"dim": 16, "n_blocks": 3, "upscaling_factor": 2, "layer_norm": True},
    ),
    "RCAN": ("RCAN", "RCAN", {"n_resgroups": 2, "n_resblocks": 2, "n_feats": 16, "scale": 2}),
    "RGT": ("RGT", "RGT", {"embed_dim": 64, "depth": [2], "num_heads": [2], "upscale": 2}),
    "Real-CUGAN x2": ("RealCUGAN", "UpCunet2x", {}),
    "Real-CUGAN x4, pro": ("RealCUGAN", "UpCunet4x", {"pro": True}),
    "RetinexFormer": ("RetinexFormer", "RetinexFormer", {"n_feat": 8, "stage": 1}),
    "SAFMN": ("SAFMN", "SAFMN", {"dim": 8, "n_blocks": 2, "upscaling_factor": 2}),
    "SAFMNBCIE": ("SAFMNBCIE", "SAFMNBCIE", {"dim": 8, "n_blocks": 2, "num_layers": 2}),
    "SCUNet": ("SCUNet", "SCUNet", {"config": [1] * 7, "dim": 64}),
    "SeemoRe": ("SeemoRe", "SeemoRe", {"num_experts": 2, "num_layers": 2, "embedding_dim": 16, "scale": 2}),
    "Swift-SRGAN": ("SwiftSRGAN", "SwiftSRGAN", {"num_channels": 8, "num_blocks": 2, "upscale_factor": 2}),
    "Swin2SR": (
        "Swin2SR",
        "Swin2SR",
        {
            "embed_dim": 12,
            "depths": [2],
            "num_heads": [2],
            "window_size": 8,
            "upscale": 2,
            "upsampler": "pixelshuffledirect",
        },
    ),
    "Uformer": ("Uformer", "Uformer", {"embed_dim": 8}),
}


@torch.no_grad()
def state_of(module: str, name: str, options: dict) -> dict[str, torch.Tensor]:
    """Tensors of a network of spandrel's with weights under which every layer changes every pixel."""
    load_spandrel()
    torch.manual_seed(0)
    network = getattr(import_module(f"spandrel.architectures.{module}"), name)(**options)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.02)
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def measured(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """The row of one network."""
    network = build(state)
    stage = Stage(network, torch.device("cpu"), "fp32")
    source = PictureSource(PHOTO)
    side = max(SIDE // network.align, 2) * network.align
    top, left = ((n - side) // 2 for n in source.size)
    picture = source.read(Box(top, left, top + side, left + side))
    x = picture[None].contiguous(memory_format=torch.channels_last)
    plain, _ = far_effect(stage.run, x, stage.scale, stage.align)
    frozen, _ = far_effect(on_picture(stage)(x), x, stage.scale, stage.align) if stage.sites else (plain, 0)
    try:
        streams = {"reach": "bands", "radius": radius(stage.graph, stage.align)}
    except UsageError as error:
        looks = "whole" if frozen > FAR_LEVELS else "statistics" if stage.sites else "local"
        reason = str(error).replace(": cannot be streamed in bands", "").partition(";")[0]
        streams = {"reach": looks, "reason": reason.removeprefix("a network by spandrel ")}
    return {
        **streams,
        "statistics": len(stage.sites),
        "grid": stage.align,
        "far effect": f"{plain:.3f}",
        "far effect, constants": f"{frozen:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    for name in parser.parse_args().only:
        row = dict.fromkeys(COLUMNS, "")
        try:
            state = state_of(*NETWORKS[name])
            identify(state)
            row |= measured(state)
        except ModelError as error:
            row |= {"reach": "refused", "reason": str(error)}
        print(name, row, flush=True)
        add_row("reach", {"network": name, **row})


if __name__ == "__main__":
    main()
