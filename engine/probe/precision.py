"""Error of half precision against float32, through the whole chain of stages.

Later stages enlarge and amplify the error of an early stage, while nearly all of the work is the last stage's. The question is
therefore from which stage on half precision may begin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.archs import Upscaler
from engine.device.runtime import hardware_name, library_versions
from engine.geometry import Box
from engine.io.photo import PictureSource
from engine.model.bundle import Model
from engine.plan.measured import PrecisionError
from engine.probe import cache
from engine.probe.content import SAMPLE_SEED, with_noise
from engine.run.base import base_image
from engine.run.stage import Stage

CROP = 64
"""Side of a crop in LR pixels: 196,608 values of output."""

_RUN_BYTES = 64 << 20
"""Upper bound of the maps of a network on a crop, and of the content."""

_MIDDLE = 512
"""Side of the region of a picture in which crops are looked for."""


def precision_errors(
    model: Model,
    stages: int,
    half: str,
    device: torch.device,
    image: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> list[PrecisionError]:
    """Error of the chain's output when the stages from k on run in half precision: one entry for every k, measured once.

    Args:
        model: model whose first ``stages`` super-resolution stages run.
        stages: number of stages.
        half: ``bf16`` or ``fp16``.
        device: device that computes.
        image: measure on this picture; by default on a sample of step 1.
        log: receives one line when the measurement begins.
    """
    content = None if image is None else _first_content(model, image)
    kind = f"step 1, seed {SAMPLE_SEED}" if content is None else content.sum().item()
    software = [torch.__version__, *library_versions(device)]
    name = cache.digest(model.digest, stages, half, str(device), hardware_name(device), kind, *software)
    stored = cache.read("precision", name)
    try:
        return [PrecisionError(**cache.numbers(e)) for e in stored]  # type: ignore[attr-defined]
    except TypeError:
        log(f"measuring the error of {half}" + (f" on {image.name}" if image else " (once)"))
    if content is None:
        content = _first_content(model, None)
    full, fast = (_chain(model, stages, precision, device) for precision in ("fp32", half))
    errors = chain_errors(
        [s.network for s in full], [s.network for s in fast], [s.sigma for s in model.stages[:stages]],
        content.to(device), max(s.align for s in full),
    )  # fmt: skip
    cache.write("precision", name, [asdict(e) for e in errors])
    return errors


def bytes_needed(model: Model, stages: int) -> int:
    """Upper bound of the host memory that ``precision_errors`` takes: networks in both precisions, and their runs."""
    weights = {described.weights for described in model.stages[:stages]}
    return sum(model.parameters(prefix) for prefix in weights) * 6 + _RUN_BYTES


@torch.inference_mode()
def chain_errors(
    full: Sequence[Upscaler], half: Sequence[Upscaler], sigmas: Sequence[float], content: Tensor, align: int
) -> list[PrecisionError]:
    """Error of the last stage's output when the stages from k on run in half precision: one entry for every k.

    Between stages the crop with the most detail is passed on.

    Args:
        full: networks in float32.
        half: the same networks in half precision.
        sigmas: input noise of every stage.
        content: input of the first stage, float32 [1, 3, h, w].
        align: sides of crops are multiples of it.
    """
    exact = _at_least(content, align)
    paths: list[Tensor] = []
    for index, (network, fast, sigma) in enumerate(zip(full, half, sigmas, strict=True)):
        crop = _most_detailed(exact, align)
        # The last input is that of a path whose half precision begins here.
        inputs = [with_noise(_cut(x, crop), sigma, network.noise_channels, index) for x in (exact, *paths, exact)]
        exact, *paths = network(inputs[0]).clamp(0, 1), *(fast(x).float().clamp(0, 1) for x in inputs[1:])
    return [_error((path - exact).abs().flatten() * 255) for path in paths]


def _chain(model: Model, stages: int, precision: str, device: torch.device) -> list[Stage]:
    """Stages with networks of their own; steps that share weights share a network."""
    by_weights: dict[str, Stage] = {}
    for index, described in enumerate(model.stages[:stages]):
        if described.weights not in by_weights:
            by_weights[described.weights] = Stage(model.new_network(index), device, precision)
    return [by_weights[described.weights] for described in model.stages[:stages]]


def _first_content(model: Model, image: Path | None) -> Tensor:
    """Input of the first stage, [1, 3, h, w]: a cheap part of the picture, or a sample of step 1."""
    if image is not None:
        return PictureSource(image).sample(_MIDDLE)[None]
    assert model.base_generator is not None
    return base_image(model.base_generator, SAMPLE_SEED)[None]


def _at_least(picture: Tensor, align: int) -> Tensor:
    """A picture smaller than one window, extended to it."""
    below, right = (max(0, align - n) for n in picture.shape[2:])
    return F.pad(picture, (0, right, 0, below), mode="replicate")


def _most_detailed(picture: Tensor, align: int) -> Box:
    height, width = (max(align, min(CROP, n) // align * align) for n in picture.shape[2:])
    boxes = [
        Box(y, x, y + height, x + width)
        for y in range(0, picture.shape[2] - height + 1, height)
        for x in range(0, picture.shape[3] - width + 1, width)
    ]
    return max(boxes, key=lambda box: float(_cut(picture, box).diff(dim=2).abs().mean()))


def _cut(picture: Tensor, box: Box) -> Tensor:
    rows, columns = box.slices
    return picture[:, :, rows, columns].contiguous(memory_format=torch.channels_last)


def _error(levels: Tensor) -> PrecisionError:
    rank = max(1, round(0.999 * levels.numel()))
    numbers = (levels.mean(), levels.kthvalue(rank).values, levels.max())
    return PrecisionError(*(round(float(n), 3) for n in numbers))
