"""What an iteration takes of memory, counted before it runs: weights, optimisers, and what the backward pass keeps.

What the forward pass of each network keeps is counted by autograd itself, on one small input, and grows with the pixels.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.archs import Upscaler, esrgan
from engine.archs.layers import RGB
from engine.errors import BudgetError
from engine.training.sr.recipe import Recipe

PROBE = 16  # side of the small input, LR pixels
BYTES_PER_WEIGHT = 4 + 4 + 8 + 4  # of a weight: itself, its gradient, Adam's two moments, the running mean


def needs_checkpointing(
    worker: Upscaler, discriminator: nn.Module, vgg: nn.Module | None, recipe: Recipe, budget: int
) -> bool:
    """Whether activations of the trunk must be computed twice (gradient checkpointing) to stay within `budget` bytes.

    Raises BudgetError if even that takes more.
    """
    plain = estimate(worker, discriminator, vgg, recipe, checkpointing=False)
    if plain <= budget:
        return False
    least = estimate(worker, discriminator, vgg, recipe, checkpointing=True)
    if least > budget:
        raise BudgetError(
            f"an iteration takes about {least / 2**30:.1f} GiB, {budget / 2**30:.1f} GiB are allowed: "
            f"take a smaller batch than {recipe.batch} or smaller crops than {recipe.crop}"
        )
    return True


def estimate(
    worker: Upscaler, discriminator: nn.Module, vgg: nn.Module | None, recipe: Recipe, *, checkpointing: bool
) -> int:
    """Bytes of weights, optimisers and activations; the working memory of single operations is not in it."""
    side = recipe.crop // worker.scale
    probe = min(side, -(-PROBE // worker.align) * worker.align)
    one = _saved_bytes_checkpointed(worker, probe) if checkpointing else _saved_bytes(worker, worker, probe)
    pixels = (side / probe) ** 2 * recipe.batch
    weights = sum(p.numel() * (BYTES_PER_WEIGHT + 2 * p.itemsize) for p in worker.parameters())
    total = weights + one * pixels
    if recipe.adversarial:
        judge = copy.deepcopy(discriminator)  # counting must not move its power iteration or its statistics
        total += sum(p.numel() * 16 for p in judge.parameters())
        looking = judge if recipe.discriminator != "projected" else _OnFeatureMaps(judge, vgg)
        # Batches of two, since batch normalisation wants more than one value; real and fake are alive at once.
        total += _saved_bytes(judge, looking, recipe.crop, batch=2) / 2 * recipe.batch * 2
    if vgg is not None:
        total += sum(p.numel() * p.itemsize for p in vgg.parameters())
        total += _saved_bytes(vgg, vgg, recipe.crop) * recipe.batch
    return int(total)


def checkpoint_blocks(worker: Upscaler) -> None:
    """Keep only what goes from block to block of the trunk, and compute the rest again on the way back."""
    for block in _blocks(worker):
        block.forward = _CheckpointedForward(block.forward)


class _CheckpointedForward:
    def __init__(self, forward: object) -> None:
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False)
        return result


class _OnFeatureMaps(nn.Module):
    """A discriminator of feature maps as one of pictures; what the feature network keeps is counted elsewhere."""

    def __init__(self, judge: nn.Module, vgg: nn.Module | None) -> None:
        super().__init__()
        self.judge, self.vgg = judge, vgg

    def forward(self, x: Tensor) -> Tensor:
        assert self.vgg is not None
        with torch.no_grad():
            maps = self.vgg(x)
        result: Tensor = self.judge(maps)
        return result


def _blocks(worker: Upscaler) -> Iterable[nn.Module]:
    return worker.body if isinstance(worker, esrgan.RRDBNet) else worker.layers


def _saved_bytes_checkpointed(worker: Upscaler, side: int) -> float:
    """The same with computation twice: what lies between the blocks, and the largest block once at a time."""
    trunk = copy.deepcopy(worker)
    block = copy.deepcopy(next(iter(_blocks(worker))))
    checkpoint_blocks(trunk)
    parameter = next(trunk.parameters())
    channels = trunk.conv_first.out_channels
    shape = (1, channels, side, side) if isinstance(worker, esrgan.RRDBNet) else (1, side, side, channels)
    x = torch.full(shape, 0.5, device=parameter.device)
    return _saved_bytes(trunk, trunk, side) + _saved_bytes(block, block, side, x=x)


def _saved_bytes(owner: nn.Module, network: nn.Module, side: int, batch: int = 1, x: Tensor | None = None) -> float:
    """Bytes that the backward pass would keep of an input [batch, channels, side, side] (or of `x`), weights not among them."""
    parameter = next(owner.parameters())
    weights = {p.untyped_storage().data_ptr() for p in (*owner.parameters(), *owner.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    if x is None:
        channels = RGB + (owner.noise_channels if isinstance(owner, Upscaler) else 0)
        x = torch.full((batch, channels, side, side), 0.5, device=parameter.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = network(x.requires_grad_(True))
    del y  # alive until here, so that no storage was given out twice
    return sum(kept.values())
