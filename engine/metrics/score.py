"""Scores of samples against their photograph: all measures of one set of images, and their means."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.metrics.area import AreaMean, Size
from engine.metrics.frechet import Gaussian, frechet_distance
from engine.metrics.images import Sample, bands, layout_size
from engine.metrics.layout import Border, colour_profile_distance, diversity, pairwise_rms
from engine.metrics.lpips import RANGES, Lpips
from engine.metrics.patches import MIN_SIDE, PatchScales, Projections, distances
from engine.metrics.sifid import LAYERS, Inception

OnRows = Callable[[int], None]
"""Receives the number of rows of one image that were read."""


@dataclass(frozen=True, slots=True)
class SampleScore:
    """Scores of one sample against the photograph."""

    name: str

    sifid: dict[str, float] | None
    """Layer -> SIFID; None if it was not requested."""

    colour_profile: float
    """Distance of the rows' mean colours, in levels."""

    patches: tuple[float, ...]
    """Sliced Wasserstein distance of the patches at every scale, full size first, in levels."""

    border: Border
    """Border of the sample itself."""


@dataclass(frozen=True, slots=True)
class Diversity:
    """Diversity of all samples."""

    lpips: dict[str, float] | None
    """Input range -> mean LPIPS over all pairs; None if it was not requested."""

    pixels: float
    """SinGAN's diversity."""

    rms: float
    """Mean RMS difference of two samples, in levels."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a set of samples; sizes are (height, width)."""

    photograph: str

    size: Size
    """Size of every sample."""

    photograph_size: Size

    base: Size
    """Size at which the layout is compared."""

    photograph_border: Border

    patch_floor: tuple[float, ...]
    """Distances between two draws of patches from the photograph itself."""

    samples: tuple[SampleScore, ...]

    diversity: Diversity | None
    """None for a single sample."""

    @property
    def sifid(self) -> dict[str, float] | None:
        """Layer -> mean SIFID over the samples."""
        values = [sample.sifid for sample in self.samples if sample.sifid is not None]
        return {layer: statistics.fmean(v[layer] for v in values) for layer in LAYERS} if values else None

    @property
    def colour_profile(self) -> float:
        """Mean over the samples, in levels."""
        return statistics.fmean(s.colour_profile for s in self.samples)

    @property
    def patches(self) -> tuple[float, ...]:
        """Means over the samples at every scale, in levels."""
        return tuple(statistics.fmean(values) for values in zip(*(s.patches for s in self.samples), strict=True))

    @property
    def border(self) -> Border:
        """Mean over the samples."""
        return Border.mean([sample.border for sample in self.samples])

    def to_json(self) -> dict[str, Any]:
        """All values and, under ``mean``, the means over the samples."""
        means = {
            "sifid": self.sifid,
            "colour_profile": self.colour_profile,
            "patches": self.patches,
            "border": asdict(self.border),
        }
        return {**asdict(self), "mean": means}


def score(
    photograph: Sample,
    samples: Sequence[Sample],
    inception: Inception | None,
    lpips: Lpips | None,
    on_rows: OnRows = lambda rows: None,
) -> Scores:
    """Compute every measure; measures without their network are left out.

    Args:
        photograph: the photograph at the samples' height, because textures are comparable at one scale only.
        samples: images of one size.
        inception: for SIFID.
        lpips: for LPIPS, with at least two samples.
        on_rows: progress; ``rows_to_read`` is the total.

    Raises:
        InputError: sizes that cannot be compared.
    """
    size = check_sizes(photograph, samples)
    base = layout_size(samples[0])
    photograph_base = (base[0], max(1, round(base[0] * photograph.size[1] / photograph.size[0])))
    real = _extract(photograph, photograph_base, inception, on_rows)
    second_draw = PatchScales(photograph.size, draw=1)
    for rows in bands(photograph.source):
        second_draw.add(rows)
        on_rows(rows.shape[1])
    scored, reduced = [], []
    for sample in samples:
        features = _extract(sample, base, inception, on_rows)
        scored.append(_compare(sample.name, features, real))
        reduced.append(features.reduced)
    return Scores(
        photograph=photograph.name,
        size=size,
        photograph_size=photograph.size,
        base=base,
        photograph_border=Border.of(real.reduced),
        patch_floor=distances(second_draw.projections(), real.patches),
        samples=tuple(scored),
        diversity=_diversity(samples, reduced, real.reduced, lpips, on_rows) if len(samples) > 1 else None,
    )


def rows_to_read(photograph: Sample, samples: Sequence[Sample], *, lpips: bool) -> int:
    """Total number of rows that ``score`` reports."""
    height = samples[0].size[0]
    return 2 * photograph.size[0] + len(samples) * height * (3 if lpips and len(samples) > 1 else 1)


def check_sizes(photograph: Sample, samples: Sequence[Sample]) -> Size:
    """Size of the samples. Raises InputError for sizes that cannot be compared."""
    if not samples:
        raise InputError("no samples to score; name pictures, stores, or folders of them")
    size = samples[0].size
    for sample in samples[1:]:
        if sample.size != size:
            raise InputError(
                f"{_with_size(sample)}, {_with_size(samples[0])}: samples must have one size; export them alike"
            )
    if min(size) < MIN_SIDE:
        raise InputError(f"{_with_size(samples[0])}: both sides must have at least {MIN_SIDE} pixels to be scored")
    if photograph.size[0] != size[0]:
        raise InputError(
            f"{_with_size(photograph)}, {_with_size(samples[0])}: heights must be equal; resize the photograph"
        )
    return size


def _with_size(sample: Sample) -> str:
    return f"{sample.name} is {sample.size[1]}x{sample.size[0]}"


@dataclass(frozen=True, slots=True)
class _Features:
    """Data of one image that the measures need after its rows have passed."""

    reduced: Tensor
    """[3, *base] in [0, 1]."""

    patches: tuple[Projections, ...]
    inception: tuple[Gaussian, ...] | None


def _extract(sample: Sample, base: Size, inception: Inception | None, on_rows: OnRows) -> _Features:
    reduction, patches = AreaMean(sample.size, base), PatchScales(sample.size)
    moments = inception.start(sample.size) if inception is not None else None
    parts = []
    for rows in bands(sample.source):
        parts.append(reduction.add(rows))
        patches.add(rows)
        if moments is not None:
            moments.add(rows)
        on_rows(rows.shape[1])
    return _Features(torch.cat(parts, 1), patches.projections(), moments.gaussians() if moments is not None else None)


def _compare(name: str, sample: _Features, real: _Features) -> SampleScore:
    sifid = None
    if sample.inception is not None and real.inception is not None:
        pairs = zip(LAYERS, sample.inception, real.inception, strict=True)
        sifid = {layer: frechet_distance(a, b) for layer, a, b in pairs}
    return SampleScore(
        name,
        sifid,
        colour_profile_distance(sample.reduced, real.reduced),
        distances(sample.patches, real.patches),
        Border.of(sample.reduced),
    )


def _diversity(
    samples: Sequence[Sample], reduced: Sequence[Tensor], photograph: Tensor, lpips: Lpips | None, on_rows: OnRows
) -> Diversity:
    means: dict[str, float] | None = None
    if lpips is not None:
        sources, n = [s.source for s in samples], len(samples)
        pairs = n * (n - 1) // 2
        matrices = {r: lpips.pairwise(sources, r, lambda rows: on_rows(rows * n)) for r in RANGES}
        means = {r: float(matrix.sum()) / 2 / pairs for r, matrix in matrices.items()}
    return Diversity(means, diversity(reduced, photograph), pairwise_rms(reduced))
