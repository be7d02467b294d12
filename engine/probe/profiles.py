"""Profiles of a model's stages: receptive fields and seam errors, from which halos follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UsageError, option
from engine.model.bundle import Model
from engine.plan.measured import StageProfile
from engine.probe import cache
from engine.probe.content import SAMPLE_SEED, detailed_crops, photograph_crops, with_noise
from engine.probe.erf import effective_radius
from engine.probe.seam import seam_curve
from engine.run.base import base_image
from engine.run.stage import Stage

Log = Callable[[str], None]


def measure_profiles(
    model: Model, image: Path | None = None, device: torch.device | None = None, log: Log = lambda _: None
) -> list[StageProfile]:
    """Measure every stage in float32.

    Args:
        model: model to measure.
        image: measure on this photograph; by default on the model's own samples.
        device: device that computes; by default the CPU.
        log: receives a line before each stage.

    Raises:
        UsageError: the model has no step 1, and no photograph is given.
    """
    if image is None and model.base_generator is None:
        raise UsageError(f"{model.path}: no step 1 to make content with; give a photograph with {option('image')}")
    profiles: list[StageProfile] = []
    measured: dict[tuple[str, float], StageProfile] = {}
    outputs: list[Tensor] = []
    for index, described in enumerate(model.stages):
        # On a photograph every stage sees the same crops: equal weights with equal noise need one measurement.
        key = (described.weights, described.sigma)
        if image is not None and key in measured:
            profiles.append(measured[key])
            continue
        stage = Stage(model.new_network(index), device or torch.device("cpu"), "fp32")
        content = _content(model, index, stage.align, image, outputs)
        log(f"step {index + 2} ({described.architecture}): measuring receptive field and seams")
        profile, outputs = _measure(stage, content, _name(image), described.sigma, index)
        measured[key] = profile
        profiles.append(profile)
    return profiles


def known_profiles(
    model: Model, device: torch.device | None = None, log: Log = lambda _: None
) -> list[StageProfile] | None:
    """Profiles from the model file or the user's cache, or measured now; None with nothing to measure on."""
    stored = [s.profile for s in model.stages]
    if all(p is not None for p in stored):
        return [p for p in stored if p is not None]
    try:
        return [StageProfile.from_json(p) for p in cache.read("profiles", _key(model))]  # type: ignore[attr-defined]
    except (ValueError, KeyError, TypeError):
        if model.base_generator is None:
            return None
    profiles = measure_profiles(model, device=device, log=log)
    remember(model, profiles)
    return profiles


def remember(model: Model, profiles: list[StageProfile]) -> None:
    """Keep profiles in the user's cache, under the model's digest."""
    cache.write("profiles", _key(model), [p.to_json() for p in profiles])


def _key(model: Model) -> str:
    return model.digest[:24]


def _name(image: Path | None) -> str:
    return f"crops of {image.name}" if image is not None else f"the model's own sample, seed {SAMPLE_SEED}"


def _content(model: Model, index: int, align: int, image: Path | None, outputs: list[Tensor]) -> list[Tensor]:
    if image is not None:
        return photograph_crops(image, align)
    if index:
        return detailed_crops(outputs, align)
    assert model.base_generator is not None
    return detailed_crops([base_image(model.base_generator, SAMPLE_SEED)[None]], align)


def _measure(
    stage: Stage, content: list[Tensor], name: str, sigma: float, index: int
) -> tuple[StageProfile, list[Tensor]]:
    content = [with_noise(c.to(stage.device), sigma, stage.noise_channels, index) for c in content]
    absolute, square = effective_radius(stage.network, content, stage.scale, stage.align)
    seam, outputs = seam_curve(stage.network, content, stage.scale, stage.align)
    return StageProfile(name, absolute, square, seam), [o.cpu() for o in outputs]
