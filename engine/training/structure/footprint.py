"""Memory of an iteration of step 1: weights, optimisers and the activations of the largest scale."""

from __future__ import annotations

from engine.training.run.footprint import peak_saved_bytes
from engine.training.structure.trainer import StructureTrainer

BYTES_PER_WEIGHT = 16
"""A weight, its gradient and Adam's two moments, all fp32."""
COUNTED_SIDE = 64
"""Smallest side of the scale whose activations are counted; VGG pads smaller ones by as much again."""


def estimate(trainer: StructureTrainer) -> int:
    """Bytes of an iteration of the last scale, without the workspace of single operations.

    Activations grow with the pixels, so they are counted on a small scale that is trained as the last one is.

    Args:
        trainer: a trainer to be thrown away: one iteration changes its weights.
    """
    sizes, last = trainer.structure.sizes, trainer.config.last
    large = (scale for scale in range(last) if min(sizes[scale]) >= COUNTED_SIDE and not trainer.is_vae(scale))
    scale = next(large, last)
    trainer.phase = scale
    trainer.begin()
    networks = [trainer.structure, trainer.encoder, trainer.discriminator]
    if trainer.vgg is not None:
        networks.append(trainer.vgg)
    weights = [weight for network in networks for weight in (*network.parameters(), *network.buffers())]
    saved = peak_saved_bytes(trainer.iterate, weights)
    trainer.end()
    trainer.phase = 0
    (height, width), (small_height, small_width) = sizes[last], sizes[scale]
    activations = saved * (height * width) / (small_height * small_width)
    trained = sum(p.numel() * BYTES_PER_WEIGHT for network in networks[:3] for p in network.parameters())
    vgg = sum(p.nbytes for p in trainer.vgg.parameters()) if trainer.vgg is not None else 0
    return int(activations) + trained + vgg
