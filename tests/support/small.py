"""Small networks with varied outputs, a model file of them, and pictures."""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from engine.archs.esrgan import RRDBNet
from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.archs.swinir import SwinIR
from engine.model.build import build
from engine.model.structure_file import write_structure


def picture(height, width, seed=0):
    """Picture [3, height, width] in [0, 1] of soft blobs and fine grain, in which a displaced or blurred pixel shows."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, height // 12), max(2, width // 12), generator=generator)
    soft = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0]
    grain = torch.rand(3, height, width, generator=generator)
    return (0.7 * soft + 0.3 * grain).clamp(0, 1)


def photograph(path, height, width):
    """Write a picture to a file; returns the path."""
    pixels = picture(height, width).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
    return path


@torch.no_grad()
def lively(network, noise):
    """Randomise weights so that the output varies around 0.5; with the usual initialisation it is nearly constant."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    network = network.eval().requires_grad_(False)
    x = torch.cat([picture(48, 48), torch.randn(network.noise_channels, 48, 48, generator=generator)])[None]
    output = network(x)
    network.conv_last.weight.mul_(0.15 / output.std())
    output = network(x)
    network.conv_last.bias.add_(0.5 - output.mean(dim=(0, 2, 3)))
    return network


def rrdb(**options):
    torch.manual_seed(0)
    return lively(RRDBNet(channels=16, blocks=2, growth=8, **options), 0.08)


def swinir():
    torch.manual_seed(0)
    return lively(SwinIR(dim=12, depths=(2, 2), heads=(2, 2), window=8, hidden=16, features=8), 0.2)


def structure():
    """Step 1 of three scales up to 24 rows by 32 columns."""
    config = Config(last=2, last_vae=1, channels=8, latent=6, layers=1)
    torch.manual_seed(0)
    structure = BaseGenerator(
        config, scale_sizes((48, 64), config.last, 32, 12), {"licence": "CC0-1.0", "source": "test"}
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in structure.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        structure.sigmas[:] = torch.tensor([1.0, 0.3, 0.2])
    return structure.requires_grad_(False)


def bundle(folder: Path, network):
    """Write a model of two steps without a margin, so that sizes are simple; tests/run/test_margin.py has a margin."""
    write_structure(structure(), folder / "structure.safetensors")
    save_file(network.state_dict(), folder / "sr.safetensors")
    checkpoint = str(folder / "sr.safetensors")
    model = build(folder / "structure.safetensors", [checkpoint, checkpoint], licence="CC0-1.0", margin=0)
    model.save(folder / "model.safetensors")
    return folder / "model.safetensors"
