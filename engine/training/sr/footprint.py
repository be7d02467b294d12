"""Memory of a training iteration, computed before it runs: weights, optimisers and saved activations.

The activations of each network are counted by autograd's own hooks on one small input; they grow with the pixels.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from engine.archs import Trainable, esrgan
from engine.archs.checkpointing import checkpoint_blocks
from engine.archs.layers import RGB
from engine.training.run.budget import check_budget
from engine.training.run.footprint import peak_saved_bytes
from engine.training.sr.recipe import Recipe

PROBE = 16
"""Side of the small input, in LR pixels."""

BYTES_PER_WEIGHT = 4 + 4 + 8 + 4
"""The master weight, its gradient, Adam's two moments and the EMA, all fp32."""


def needs_checkpointing(
    name: str,
    network: Trainable,
    discriminator: nn.Module,
    vgg: nn.Module | None,
    recipe: Recipe,
    budget: int,
    device: torch.device,
) -> bool:
    """Decide whether the trunk needs activation checkpointing to stay within the budget.

    Args:
        name: the training, for messages.
        network: the generator's compute copy, in the dtype in which it trains.
        discriminator: counted if the recipe is adversarial.
        vgg: feature network of the losses, if any.
        recipe: batch, crop and losses.
        budget: bytes that an iteration may take.
        device: device of the networks.

    Raises:
        BudgetError: an iteration does not fit even with checkpointing.
    """
    if estimate(network, discriminator, vgg, recipe, checkpointing=False) <= budget:
        return False
    smallest = estimate(network, discriminator, vgg, recipe, checkpointing=True)
    advice = f"use a smaller batch than {recipe.batch}, smaller crops than {recipe.crop}"
    check_budget(name, smallest, budget, advice, device)
    return True


def estimate(
    network: Trainable, discriminator: nn.Module, vgg: nn.Module | None, recipe: Recipe, *, checkpointing: bool
) -> int:
    """Bytes of weights, optimisers and activations, without the workspace of single operations.

    Args:
        network: the generator's compute copy.
        discriminator: counted if the recipe is adversarial; a copy is run, so its state does not change.
        vgg: feature network of the losses, if any.
        recipe: batch, crop and losses.
        checkpointing: whether ``checkpoint_blocks`` is applied to the network.
    """
    side = recipe.crop // network.scale
    probe = min(side, -(-PROBE // network.align) * network.align)
    activations = _saved_bytes_checkpointed(network, probe) if checkpointing else _saved_bytes(network, network, probe)
    pixels = (side / probe) ** 2 * recipe.batch
    weights = sum(p.numel() * (BYTES_PER_WEIGHT + 2 * p.itemsize) for p in network.parameters())
    total = weights + activations * pixels
    if recipe.adversarial:
        # A copy: counting must not advance the power iteration of spectral norm or the statistics of batch norm.
        discriminator = copy.deepcopy(discriminator)
        total += sum(p.numel() * 16 for p in discriminator.parameters())
        on_images = discriminator if recipe.discriminator != "projected" else _OnFeatureMaps(discriminator, vgg)
        # Batches of two, because batch norm needs more than one value. Real and fake activations are alive together.
        total += _saved_bytes(discriminator, on_images, recipe.crop, batch=2) / 2 * recipe.batch * 2
    if vgg is not None:
        total += sum(p.numel() * p.itemsize for p in vgg.parameters())
        total += _saved_bytes(vgg, vgg, recipe.crop) * recipe.batch
    return int(total)


class _OnFeatureMaps(nn.Module):
    """Discriminator of feature maps as one of images; activations of the feature network are not counted."""

    def __init__(self, discriminator: nn.Module, vgg: nn.Module | None) -> None:
        super().__init__()
        self.discriminator, self.vgg = discriminator, vgg

    def forward(self, x: Tensor) -> Tensor:
        assert self.vgg is not None
        with torch.no_grad():
            maps = self.vgg(x)
        result: Tensor = self.discriminator(maps)
        return result


def _saved_bytes_checkpointed(network: Trainable, side: int) -> float:
    """Saved activations with checkpointing: the inputs of all blocks, and one block's activations at a time."""
    trunk = copy.deepcopy(network)
    block = copy.deepcopy(next(iter(network.blocks)))
    checkpoint_blocks(trunk)
    parameter = next(trunk.parameters())
    channels = trunk.conv_first.out_channels
    shape = (1, channels, side, side) if isinstance(network, esrgan.RRDBNet) else (1, side, side, channels)
    x = torch.full(shape, 0.5, device=parameter.device)
    return _saved_bytes(trunk, trunk, side) + _saved_bytes(block, block, side, x=x)


def _saved_bytes(owner: nn.Module, network: nn.Module, side: int, batch: int = 1, x: Tensor | None = None) -> float:
    """Bytes that autograd saves for the backward pass, without weights.

    Args:
        owner: module whose parameters and buffers are not counted.
        network: module to run.
        side: side of the input in pixels.
        batch: images of the input [batch, channels, side, side].
        x: input to use instead.
    """
    if x is None:
        channels = RGB + (owner.noise_channels if isinstance(owner, Trainable) else 0)
        x = torch.full((batch, channels, side, side), 0.5, device=next(owner.parameters()).device)
    x.requires_grad_(True)
    return peak_saved_bytes(lambda: network(x), (*owner.parameters(), *owner.buffers()))
