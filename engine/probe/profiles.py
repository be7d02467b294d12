"""Profiles of a model's stages: receptive fields and seam errors, from which halos follow."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from engine.archs import Trainable
from engine.archs.checkpointing import checkpoint_blocks
from engine.errors import UsageError, option
from engine.geometry import UNBOUNDED
from engine.io.original import OriginalPicture
from engine.model.bundle import Model
from engine.plan.halo import HaloPolicy
from engine.plan.measured import StageProfile
from engine.probe import cache
from engine.probe.content import (
    CROP,
    MIN_CROP,
    SAMPLE_SEED,
    detailed_crops,
    is_measurable,
    photograph_crops,
    with_noise,
)
from engine.probe.erf import LARGE_SIDE, SAMPLES, SIDE, effective_radius
from engine.probe.reach import is_local, on_picture
from engine.probe.seam import RUNS, seam_curve
from engine.probe.sides import BYTES_IN_CHUNKS, BYTES_OF_GRADIENT, side_within
from engine.run.base import base_image
from engine.run.stage import TAIL_CHUNKS, Stage

Log = Callable[[str], None]

_FULL, _SEAMS = "profiles", "seams"
"""Groups of the cache: profiles with receptive fields, and profiles of seams alone."""

_LOG_SECONDS = 5.0
"""Time between two lines about a measurement."""


def measure_profiles(
    model: Model,
    image: Path | None = None,
    device: torch.device | None = None,
    log: Log = lambda _: None,
    *,
    stages: int | None = None,
    with_erf: bool = True,
    limit: int | None = None,
) -> list[StageProfile]:
    """Measure the stages of a model in float32.

    Args:
        model: model to measure.
        image: measure on this photograph; by default on the model's own samples.
        device: device that computes; by default the CPU.
        log: receives a line before each stage, and every few seconds the share that is done.
        stages: number of stages, from the first on; by default all.
        with_erf: measure receptive fields too, whose gradients take many times the memory and time of the seams.
        limit: bytes of memory that the process may take where it computes; less memory means smaller crops.

    Raises:
        UsageError: the model has no step 1, and no photograph is given.
    """
    if image is None and model.base_generator is None:
        raise UsageError(f"{model.path}: no step 1 to make content with; give a photograph with {option('image')}")
    profiles: list[StageProfile] = []
    measured: dict[tuple[str, float], StageProfile] = {}
    outputs: list[Tensor] = []
    for index, described in enumerate(model.stages[:stages]):
        # On a photograph every stage sees the same crops: equal weights with equal noise need one measurement.
        key = (described.weights, described.sigma)
        if image is not None and key in measured:
            profiles.append(measured[key])
            continue
        stage = Stage(model.new_network(index), device or torch.device("cpu"), "fp32")
        side = side_within(limit, CROP, MIN_CROP, BYTES_IN_CHUNKS, stage.device)
        content = [
            with_noise(c.to(stage.device), described.sigma, stage.noise_channels, index)
            for c in _content(model, index, stage.align, image, outputs, side)
        ]
        name = f"step {index + 2} ({described.architecture})"
        log(f"{name}: measuring {'receptive field and seams' if with_erf else 'seams'}")
        eta = _Eta(log, f"{name}, seams", RUNS * len(content))
        is_known = stage.radius < UNBOUNDED
        looks_near = is_known or is_local(stage, content[0])
        statistics = 0 if is_known or not looks_near else len(stage.sites)
        seam, stage_outputs = seam_curve(
            _in_chunks(stage),
            content,
            stage.scale,
            stage.align,
            eta.advance,
            on_picture=on_picture(stage) if statistics else None,
        )
        absolute: dict[str, int] = {}
        square: dict[str, int] = {}
        if with_erf:
            if isinstance(stage.network, Trainable):
                checkpoint_blocks(stage.network)
            largest = side_within(limit, LARGE_SIDE, SIDE // 2, BYTES_OF_GRADIENT, stage.device)
            eta = _Eta(log, f"{name}, receptive field", 2 * SAMPLES)
            absolute, square = effective_radius(stage.network, content, stage.scale, stage.align, largest, eta.advance)
        outputs = [output.cpu() for output in stage_outputs]
        measured[key] = StageProfile(_name(image), absolute, square, seam, statistics, looks_near)
        profiles.append(measured[key])
    return profiles


def known_profiles(
    model: Model, policy: HaloPolicy | None = None, picture: OriginalPicture | None = None
) -> list[StageProfile] | None:
    """Profiles of all stages from the model file or the user's cache; None if there are none for this policy."""
    needs_erf = policy is not None and policy.needs_erf
    stored = [s.profile for s in model.stages]
    if all(p is not None for p in stored):
        return [p for p in stored if p is not None]
    groups = [(_FULL, _key(model)), (_FULL, _key(model, picture))]
    if not needs_erf:
        groups.append((_SEAMS, _key(model, picture)))
    for group, key in groups:
        with suppress(ValueError, KeyError, TypeError):
            return [StageProfile.from_json(p) for p in cache.read(group, key)]  # type: ignore[attr-defined]
    return None


def measure_for_render(
    model: Model,
    stages: int,
    policy: HaloPolicy,
    picture: OriginalPicture | None,
    device: torch.device,
    log: Log = lambda _: None,
    limit: int | None = None,
) -> list[StageProfile]:
    """Measure what a halo policy needs of the first stages, and keep it in the user's cache.

    Content is the model's own sample, or the picture if the model has no step 1. A picture that is too small to measure on
    gives empty profiles, for which a policy chooses exact halos.
    """
    image = None
    if model.base_generator is None:
        assert picture is not None
        image = picture.path
        align = max(model.network(index).align for index in range(stages))
        if not is_measurable(picture.size, align):
            log(f"{image}: too small to measure seams; halos are exact")
            return [StageProfile("nothing: the picture is too small", {}, {}, ())] * stages
    profiles = measure_profiles(model, image, device, log, stages=stages, with_erf=policy.needs_erf, limit=limit)
    group = _FULL if policy.needs_erf else _SEAMS
    cache.write(group, _key(model, picture if image else None), [p.to_json() for p in profiles])
    return profiles


def remember(model: Model, profiles: list[StageProfile]) -> None:
    """Keep full profiles in the user's cache, under the model's digest."""
    cache.write(_FULL, _key(model), [p.to_json() for p in profiles])


class _Eta:
    """Logs the share of a measurement that is done, and the time left, every few seconds."""

    def __init__(self, log: Log, name: str, total: int) -> None:
        self._log, self._name, self._total = log, name, total
        self._done, self._start = 0, time.monotonic()
        self._logged = self._start

    def advance(self) -> None:
        """Count one run of the network."""
        self._done += 1
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS and self._done < self._total:
            self._logged = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._log(f"{self._name}: {self._done / self._total:.0%} measured, about {left:.0f} s left")


def _key(model: Model, picture: OriginalPicture | None = None) -> str:
    return model.digest[:24] if picture is None else cache.digest(model.digest, picture.digest)


def _name(image: Path | None) -> str:
    return f"crops of {image.name}" if image is not None else f"the model's own sample, seed {SAMPLE_SEED}"


def _content(
    model: Model, index: int, align: int, image: Path | None, outputs: list[Tensor], side: int
) -> list[Tensor]:
    if image is not None:
        return photograph_crops(image, align, side)
    if index:
        return detailed_crops(outputs, align, side)
    assert model.base_generator is not None
    return detailed_crops([base_image(model.base_generator, SAMPLE_SEED)[None]], align, side)


def _in_chunks(stage: Stage) -> Callable[[Tensor], Tensor]:
    """The network of a stage with its tail in chunks, which take no more memory than the trunk."""
    return lambda picture: stage.run(picture, TAIL_CHUNKS)
