"""The size of the output and the base image that leads to it. Knows nothing of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import UsageError


@dataclass(frozen=True, slots=True)
class Canvas:
    """The size that was asked for and the base image that leads to it: base * scales >= size, cropped at the end.
    ``margin``: so many pixels along the base's sides are context alone.
    """

    size: tuple[int, int]
    base: tuple[int, int]
    stages: int
    margin: int = 0

    def with_margin(self, margin: int) -> Canvas:
        height, width = self.base
        return Canvas(self.size, (height + 2 * margin, width + 2 * margin), self.stages, margin)


def resolve_canvas(
    size: tuple[int, int] | None, native: tuple[int, int] | None, scales: Sequence[int], stages: int | None
) -> Canvas:
    """Choose the number of stages and the base size. Sizes are (height, width).

    ``native``: size of the image that starts the chain: what step 1 was trained at, or the picture given instead.
    Without ``size`` all stages run on it. With one, the number of stages (unless given) is the one whose base comes
    nearest to ``native``.
    """
    if stages is not None and not 1 <= stages <= len(scales):
        raise UsageError(
            f"--stages {stages}: the model has {len(scales)} super-resolution stages; use 1 to {len(scales)}"
        )
    if size is None:
        if native is None:
            raise UsageError("the model has no step 1: give a picture to start from with --init, or a --size")
        count = stages or len(scales)
        factor = math.prod(scales[:count])
        return Canvas((native[0] * factor, native[1] * factor), native, count)
    if min(size) < 1:
        raise UsageError(f"size {size[1]}x{size[0]}: both sides must be at least 1 pixel")

    def base(count: int) -> tuple[int, int]:
        factor = math.prod(scales[:count])
        return -(-size[0] // factor), -(-size[1] // factor)

    def distance(count: int) -> float:
        return abs(math.log(math.prod(base(count)) / math.prod(native or base(len(scales)))))

    count = stages or min(range(1, len(scales) + 1), key=distance)
    return Canvas(size, base(count), count)
