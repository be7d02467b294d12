"""Sizes of a render: the base image, its enlargement, and the image. Knows nothing of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from operator import mul

from engine.errors import UsageError, counted, option
from engine.plan.reduction import Reduction

MAX_REPETITIONS = 3
"""Most often that a lone network runs: as often as the paper enlarges."""

_STRETCH = 0.02
"""Largest difference of the enlargements of both sides."""

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """Sizes (height, width) from the base image to the image: base * scales >= enlarged >= size.

    The enlarged base is cropped to ``enlarged``, and reduced to ``size`` where the two differ.
    """

    size: Size
    """Size of the image."""
    base: Size
    """Size of the base image, with its margin."""
    stages: int
    """Number of super-resolution steps."""
    margin: int = 0
    """Pixels along each side of the base image that are context only."""
    enlarged: Size | None = None
    """Size of the last step's image where it is reduced to ``size``; None if it is the image itself."""
    wraps: tuple[bool, bool] = (False, False)
    """Whether the image repeats along (rows, columns)."""
    keeps_scene: bool = True
    """Whether other sizes of the same shape have the same base image, so that a seed shows the same scene."""

    @property
    def reduction(self) -> Reduction:
        """Reduction of the last step's image to the image; the identity if there is none."""
        return Reduction(self.enlarged or self.size, self.size)

    def with_margin(self, margin: int) -> Canvas:
        """The same canvas with a margin around its base, except along axes that wrap: the other side is there."""
        height, width = (n if wraps else n + 2 * margin for n, wraps in zip(self.base, self.wraps, strict=True))
        return replace(self, base=(height, width), margin=0 if all(self.wraps) else margin)


def canvas_of_scene(size: Size | None, native: Size, scales: Sequence[int], stages: int | None) -> Canvas:
    """Canvas of an image that step 1 begins. The base depends on the shape of the image alone, so a seed keeps its scene.

    The longer side of the base is a multiple of half of the longer side of ``native``, the multiple that brings its area
    nearest to that of ``native``. The image is the smallest enlargement of that base that covers ``size``, reduced.

    A requested number of stages, or a size beyond all stages, takes a base that fits the size, and another scene.

    Args:
        size: image that is requested; None for all stages applied to ``native``.
        native: size that step 1 was trained at.
        scales: enlargement of every stage of the model.
        stages: number of stages; by default as many as the size takes.

    Raises:
        UsageError: the model has fewer stages, or the size has an empty side.
    """
    _check_stages(stages, scales)
    if size is None:
        return _uncropped(native, scales, stages)
    _check_size(size)
    factors = tuple(accumulate(scales, mul))
    longer = _longer_side(size, native)
    count = next((k for k, factor in enumerate(factors, 1) if longer * factor >= max(size)), None)
    count = count and _with_unscaled(count, scales)
    if stages is not None or count is None:
        count = stages or len(scales)
        return Canvas(size, _covering(size, Fraction(1, factors[count - 1])), count, keeps_scene=False)
    ratio = longer / max(size)  # pixels of the base for each pixel of the image
    enlarged = _covering(size, ratio * factors[count - 1])
    return Canvas(size, _covering(size, ratio), count, enlarged=None if enlarged == size else enlarged)


def wrapped_scene(canvas: Canvas, wraps: tuple[bool, bool], scales: Sequence[int], aligns: Sequence[int]) -> Canvas:
    """Canvas of the same image, repeated along these axes. A period is a whole enlargement of the base image, reduced.

    Args:
        canvas: canvas of the image that step 1 begins, without a margin.
        wraps: whether (rows, columns) repeat.
        scales, aligns: enlargement and window of every stage of the model.

    Raises:
        UsageError: a whole enlargement would be stretched by more than 2 %.
    """
    unit, factor = _least_period(canvas, scales, aligns)
    base, enlarged = list(canvas.base), list(canvas.enlarged or canvas.size)
    for axis, repeats in enumerate(wraps):
        if repeats:
            base[axis] = -(-base[axis] // unit) * unit
            enlarged[axis] = base[axis] * factor
    height, width = (n / m for n, m in zip(enlarged, canvas.size, strict=True))
    if max(height, width) > (1 + _STRETCH) * min(height, width):
        step = unit * factor
        rows, columns = (
            max(1, round(n / step)) * step if repeats else n for n, repeats in zip(canvas.size, wraps, strict=True)
        )
        raise UsageError(
            f"{_size_option(canvas.size)}: would stretch what repeats by {max(height, width) / min(height, width) - 1:.0%} "
            f"(sides of multiples of {step} are exact); use {columns}x{rows}"
        )
    size = (enlarged[0], enlarged[1])
    return replace(canvas, base=(base[0], base[1]), enlarged=None if size == canvas.size else size, wraps=wraps)


def wrapped_picture(
    canvas: Canvas, wraps: tuple[bool, bool], picture: Size, scales: Sequence[int], aligns: Sequence[int]
) -> Canvas:
    """Canvas of an enlarged picture, repeated along these axes; the arguments are those of ``wrapped_scene``.

    Raises:
        UsageError: the picture is no whole number of windows, or smaller than the size after all stages.
    """
    unit, factor = _least_period(canvas, scales, aligns)
    height, width = (n // unit * unit if repeats else n for n, repeats in zip(picture, wraps, strict=True))
    if (height, width) != picture:
        raise UsageError(
            f"{option('wrap')}: a picture of {picture[1]}x{picture[0]} does not repeat in the windows of the model "
            f"({unit} pixels); resize it to {max(width, unit)}x{max(height, unit)}"
        )
    if canvas.base != picture:
        raise UsageError(
            f"{_size_option(canvas.size)}: too large to repeat (at most {picture[1] * factor}x{picture[0] * factor} from "
            f"{picture[1]}x{picture[0]}); use that, or a model of more steps"
        )
    return replace(canvas, wraps=wraps)


def first_enlargement(size: Size | None, native: Size, scale: int) -> Size:
    """Size of the first enlargement of the base image that ``size`` begins with: its smallest unreduced size."""
    size = size or native
    return _covering(size, _longer_side(size, native) * scale / max(size))


def canvas_of_picture(size: Size | None, picture: Size, scales: Sequence[int], stages: int | None) -> Canvas:
    """Canvas of an enlarged picture: the fewest stages that cover the size, then a reduction.

    The picture itself is never reduced. It is resampled only where all stages together are smaller than the size.

    Args:
        size: image that is requested; None for all stages applied to the picture.
        picture: size of the picture.
        scales: enlargement of every stage of the model.
        stages: number of stages; by default as many as the size takes.

    Raises:
        UsageError: the model has fewer stages, or the size has an empty side or stretches the picture.
    """
    _check_stages(stages, scales)
    if size is None:
        return _uncropped(picture, scales, stages)
    _check_size(size)
    _check_aspect(picture, size)
    count = stages or stages_to_cover(picture, size, scales) or len(scales)
    factor = math.prod(scales[:count])
    enlarged = (picture[0] * factor, picture[1] * factor)
    if enlarged[0] < size[0] or enlarged[1] < size[1]:
        return Canvas(size, _covering(size, Fraction(1, factor)), count)
    return Canvas(size, picture, count, enlarged=None if enlarged == size else enlarged)


def repetitions(picture: Size, size: Size | None, scale: int, stages: int | None) -> int:
    """Number of times that a lone network of a scale runs to enlarge a picture: as often as the size takes, up to 3.

    A network that does not enlarge, such as one against the artefacts of JPEG, runs once.
    """
    if scale == 1 and stages is None:
        return 1
    if stages is not None or size is None:
        return min(stages or 1, MAX_REPETITIONS)
    return stages_to_cover(picture, size, [scale] * MAX_REPETITIONS) or MAX_REPETITIONS


def stages_to_cover(picture: Size, size: Size, scales: Sequence[int]) -> int | None:
    """The fewest stages whose enlargement of a picture is at least as large as a size; None if all are too few.

    Stages behind them that do not enlarge belong to them.
    """
    needed = max(Fraction(n, side) for n, side in zip(size, picture, strict=True))
    count = next((k for k, factor in enumerate(accumulate(scales, mul), 1) if factor >= needed), None)
    return count and _with_unscaled(count, scales)


def _with_unscaled(count: int, scales: Sequence[int]) -> int:
    """Number of the first ``count`` stages and of those behind them that do not enlarge."""
    return next((k for k in range(count, len(scales)) if scales[k] != 1), len(scales))


def _least_period(canvas: Canvas, scales: Sequence[int], aligns: Sequence[int]) -> tuple[int, int]:
    """Pixels of the base that are whole windows in every stage, and the enlargement of all stages."""
    unit, factor = 1, 1
    for scale, align in zip(scales[: canvas.stages], aligns, strict=False):
        unit = math.lcm(unit, align // math.gcd(align, factor))
        factor *= scale
    return unit, factor


def _size_option(size: Size) -> str:
    return option("size", f"{size[1]}x{size[0]}")


def _longer_side(size: Size, native: Size) -> Fraction:
    """Longer side of the base image of a shape: a multiple of half of the longer side of ``native``."""
    unit = Fraction(max(native), 2)
    same_area = math.sqrt(math.prod(native) * max(size) / min(size))
    return unit * max(1, round(same_area / unit))


def _covering(size: Size, ratio: Fraction) -> Size:
    """``size`` times ``ratio``, rounded up to whole pixels."""
    return math.ceil(size[0] * ratio), math.ceil(size[1] * ratio)


def _uncropped(base: Size, scales: Sequence[int], stages: int | None) -> Canvas:
    count = stages or len(scales)
    factor = math.prod(scales[:count])
    return Canvas((base[0] * factor, base[1] * factor), base, count)


def _check_stages(stages: int | None, scales: Sequence[int]) -> None:
    if stages is not None and not 1 <= stages <= len(scales):
        count = len(scales)
        valid = "1" if count == 1 else f"1 to {count}"
        raise UsageError(
            f"{option('stages', stages)}: the model has {counted(count, 'super-resolution step')}; use {valid}"
        )


def _check_size(size: Size) -> None:
    if min(size) < 1:
        raise UsageError(f"{_size_option(size)}: has an empty side; use at least 1 pixel")


def _check_aspect(picture: Size, size: Size) -> None:
    """Refuse a size that stretches the picture by more than 2 %, or by a pixel where that is more."""
    height = size[1] * picture[0] / picture[1]
    if abs(size[0] - height) > max(1.0, _STRETCH * height):
        raise UsageError(
            f"{_size_option(size)}: would stretch the picture of {picture[1]}x{picture[0]} by "
            f"{abs(height / size[0] - 1):.0%}; use {size[1]}x{max(1, round(height))}, or leave it out"
        )
