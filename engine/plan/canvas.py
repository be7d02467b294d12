"""Size of the output and of the base image that leads to it. Knows nothing of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import UsageError, option


@dataclass(frozen=True, slots=True)
class Canvas:
    """Size of the image, and the base image that leads to it: base * scales >= size, cropped at the end."""

    size: tuple[int, int]
    """(height, width) of the image."""
    base: tuple[int, int]
    """(height, width) of the base image, with its margin."""
    stages: int
    """Number of super-resolution steps."""
    margin: int = 0
    """Pixels along each side of the base image that are context only."""

    def with_margin(self, margin: int) -> Canvas:
        """The same canvas with a margin around its base."""
        height, width = self.base
        return Canvas(self.size, (height + 2 * margin, width + 2 * margin), self.stages, margin)


def resolve_canvas(
    size: tuple[int, int] | None, native: tuple[int, int] | None, scales: Sequence[int], stages: int | None
) -> Canvas:
    """Choose the number of stages and the size of the base image. Sizes are (height, width).

    Args:
        size: image that is requested; None for all stages applied to ``native``.
        native: size that step 1 was trained at, or the size of the picture given instead.
        scales: enlargement of every stage of the model.
        stages: number of stages; by default the number whose base comes nearest to ``native``.

    Raises:
        UsageError: the model has fewer stages, the size has an empty side, or no size is known.
    """
    if stages is not None and not 1 <= stages <= len(scales):
        raise UsageError(
            f"{option('stages', stages)}: the model has {len(scales)} super-resolution steps; use 1 to {len(scales)}"
        )
    if size is None:
        if native is None:
            raise UsageError(f"the model has no step 1; give a picture with {option('init')}, or {option('size')}")
        count = stages or len(scales)
        factor = math.prod(scales[:count])
        return Canvas((native[0] * factor, native[1] * factor), native, count)
    if min(size) < 1:
        raise UsageError(f"{option('size', f'{size[1]}x{size[0]}')}: has an empty side; use at least 1 pixel")

    def base(count: int) -> tuple[int, int]:
        factor = math.prod(scales[:count])
        return -(-size[0] // factor), -(-size[1] // factor)

    def distance(count: int) -> float:
        return abs(math.log(math.prod(base(count)) / math.prod(native or base(len(scales)))))

    count = stages or min(range(1, len(scales) + 1), key=distance)
    return Canvas(size, base(count), count)
