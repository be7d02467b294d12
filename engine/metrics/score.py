"""Samples against the photograph: every measure of one set of pictures, and the means that are published."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.metrics.area import AreaMean
from engine.metrics.frechet import Gaussian, frechet_distance
from engine.metrics.images import Sample, Size, bands, base_size
from engine.metrics.layout import Border, colour_profile_distance, diversity, pairwise_rms
from engine.metrics.lpips import RANGES, Lpips
from engine.metrics.patches import LEAST, PatchScales, Projections, distances
from engine.metrics.sifid import LAYERS, Inception

OnRows = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class SampleScore:
    """One sample against the photograph. ``sifid``: layer -> distance, None when it was not asked for; ``patches``: sliced
    Wasserstein distance of every scale, full size first; ``border`` of the sample alone."""

    name: str
    sifid: dict[str, float] | None
    colour_profile: float
    patches: tuple[float, ...]
    border: Border


@dataclass(frozen=True, slots=True)
class Diversity:
    """Of all samples. ``lpips``: range of the input -> mean over all pairs, None when it was not asked for."""

    lpips: dict[str, float] | None
    pixels: float
    rms: float


@dataclass(frozen=True, slots=True)
class Scores:
    """Sizes are (height, width). ``patch_floor``: what two draws of patches from the photograph itself are apart;
    ``diversity`` is None of a single sample."""

    photograph: str
    size: Size
    photograph_size: Size
    base: Size
    photograph_border: Border
    patch_floor: tuple[float, ...]
    samples: tuple[SampleScore, ...]
    diversity: Diversity | None

    @property
    def sifid(self) -> dict[str, float] | None:
        """Layer -> mean over the samples."""
        found = [sample.sifid for sample in self.samples if sample.sifid is not None]
        return {layer: statistics.fmean(f[layer] for f in found) for layer in LAYERS} if found else None

    @property
    def colour_profile(self) -> float:
        return statistics.fmean(s.colour_profile for s in self.samples)

    @property
    def patches(self) -> tuple[float, ...]:
        return tuple(statistics.fmean(values) for values in zip(*(s.patches for s in self.samples), strict=True))

    @property
    def border(self) -> Border:
        return Border.mean([sample.border for sample in self.samples])

    def to_json(self) -> dict[str, Any]:
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
    """Every measure; those without a network are left out. ``on_rows(n)``: n rows of one picture were read.

    Raises InputError unless the samples have one size, and the photograph their height: textures can be compared only
    at one scale.
    """
    size = check_sizes(photograph, samples)
    base = base_size(samples[0])
    real_base = (base[0], max(1, round(base[0] * photograph.size[1] / photograph.size[0])))
    real = _look(photograph, real_base, inception, on_rows)
    again = PatchScales(photograph.size, draw=1)
    for rows in bands(photograph.source):
        again.add(rows)
        on_rows(rows.shape[1])
    scored, small = [], []
    for sample in samples:
        view = _look(sample, base, inception, on_rows)
        scored.append(_against(sample.name, view, real))
        small.append(view.small)
    return Scores(
        photograph=photograph.name,
        size=size,
        photograph_size=photograph.size,
        base=base,
        photograph_border=Border.of(real.small),
        patch_floor=distances(again.projections(), real.patches),
        samples=tuple(scored),
        diversity=_diversity(samples, small, real.small, lpips, on_rows) if len(samples) > 1 else None,
    )


def rows_to_read(photograph: Sample, samples: Sequence[Sample], lpips: bool) -> int:
    """How many rows ``score`` will report in all."""
    height = samples[0].size[0]
    return 2 * photograph.size[0] + len(samples) * height * (3 if lpips and len(samples) > 1 else 1)


def check_sizes(photograph: Sample, samples: Sequence[Sample]) -> Size:
    """(height, width) of the samples. Raises InputError as ``score`` does."""
    if not samples:
        raise InputError("no samples to score; name pictures, stores, or folders of them")
    size = samples[0].size
    for sample in samples[1:]:
        if sample.size != size:
            raise InputError(f"{_told(sample)}, {_told(samples[0])}: samples must have one size; export them alike")
    if min(size) < LEAST:
        raise InputError(f"{_told(samples[0])}: both sides must have at least {LEAST} pixels to be scored")
    if photograph.size[0] != size[0]:
        raise InputError(f"{_told(photograph)}, {_told(samples[0])}: heights must be equal; resize the photograph")
    return size


def _told(sample: Sample) -> str:
    return f"{sample.name} is {sample.size[1]}x{sample.size[0]}"


@dataclass(frozen=True, slots=True)
class _View:
    """What remains of a picture after its rows have passed."""

    small: Tensor  # [3, *base]
    patches: tuple[Projections, ...]
    features: tuple[Gaussian, ...] | None


def _look(sample: Sample, base: Size, inception: Inception | None, on_rows: OnRows) -> _View:
    small, patches = AreaMean(sample.size, base), PatchScales(sample.size)
    features = inception.start(sample.size) if inception is not None else None
    made = []
    for rows in bands(sample.source):
        made.append(small.add(rows))
        patches.add(rows)
        if features is not None:
            features.add(rows)
        on_rows(rows.shape[1])
    return _View(torch.cat(made, 1), patches.projections(), features.gaussians() if features is not None else None)


def _against(name: str, view: _View, real: _View) -> SampleScore:
    sifid = None
    if view.features is not None and real.features is not None:
        found = zip(LAYERS, view.features, real.features, strict=True)
        sifid = {layer: frechet_distance(a, b) for layer, a, b in found}
    return SampleScore(
        name,
        sifid,
        colour_profile_distance(view.small, real.small),
        distances(view.patches, real.patches),
        Border.of(view.small),
    )


def _diversity(
    samples: Sequence[Sample], small: Sequence[Tensor], photograph: Tensor, lpips: Lpips | None, on_rows: OnRows
) -> Diversity:
    found: dict[str, float] | None = None
    if lpips is not None:
        sources, n = [s.source for s in samples], len(samples)
        pairs = n * (n - 1) // 2
        matrices = {given: lpips.pairwise(sources, given, lambda rows: on_rows(rows * n)) for given in RANGES}
        found = {given: float(matrix.sum()) / 2 / pairs for given, matrix in matrices.items()}
    return Diversity(found, diversity(small, photograph), pairwise_rms(small))
