"""Measures a model: receptive fields, seam errors, memory and time. Its numbers decide halos and tiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UsageError
from engine.geometry import Box
from engine.io.photo import PictureSource
from engine.model.bundle import Model
from engine.plan.cost import BandCost
from engine.plan.measured import Footprint, PrecisionError, StageProfile
from engine.probe import footprint, precision
from engine.probe.content import detailed_crops, photograph_crops, with_noise
from engine.probe.erf import effective_radius
from engine.probe.seam import seam_curve
from engine.run.base import base_image
from engine.run.stage import Stage

_SEED = 0
_MIDDLE = 512


def probe(
    model: Model,
    image: Path | None = None,
    device: torch.device | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> list[StageProfile]:
    """Profile of every stage, in float32. ``image``: measure on this photograph, not on the model's own samples.

    ``log`` receives a line before each stage. Raises UsageError when there is no content to measure on.
    """
    if image is None and model.structure is None:
        raise UsageError(f"{model.path}: no step 1 to make content with; give a photograph with --image")
    profiles: list[StageProfile] = []
    measured: dict[tuple[str, float], StageProfile] = {}
    outputs: list[Tensor] = []
    for index, described in enumerate(model.stages):
        # On a photograph every stage sees the same crops: equal weights with equal noise need one measurement.
        key = (described.weights, described.sigma)
        if image is not None and key in measured:
            profiles.append(measured[key])
            continue
        where = device or torch.device("cpu")
        stage = Stage(model.network(index, "fp32", str(where)), where, "fp32")
        content = _content(model, index, stage.align, image, outputs)
        log(f"measuring stage {index + 1} of {len(model.stages)} ({described.architecture}): receptive field and seams")
        profile, outputs = _measure(stage, content, _name(model, image), described.sigma, index)
        measured[key] = profile
        profiles.append(profile)
    return profiles


def _name(model: Model, image: Path | None) -> str:
    return f"crops of {image.name}" if image is not None else f"the model's own sample, seed {_SEED}"


def _content(model: Model, index: int, align: int, image: Path | None, outputs: list[Tensor]) -> list[Tensor]:
    if image is not None:
        return photograph_crops(image, align)
    if index:
        return detailed_crops(outputs, align)
    assert model.structure is not None
    return detailed_crops([base_image(model.structure, _SEED)[None]], align)


def _measure(
    stage: Stage, content: list[Tensor], name: str, sigma: float, index: int
) -> tuple[StageProfile, list[Tensor]]:
    content = [with_noise(c.to(stage.device), sigma, stage.noise_channels, index) for c in content]
    absolute, square = effective_radius(stage.network, content, stage.scale, stage.align)
    seam, outputs = seam_curve(stage.network, content, stage.scale, stage.align)
    return StageProfile(name, absolute, square, seam), [o.cpu() for o in outputs]


def profiles_of(
    model: Model, device: torch.device | None = None, log: Callable[[str], None] = lambda _: None
) -> list[StageProfile] | None:
    """Profiles from the model file, the user's cache, or measured now; None with nothing to measure on."""
    stored = [s.profile for s in model.stages]
    if all(p is not None for p in stored):
        return [p for p in stored if p is not None]
    path = footprint.cache_folder() / "profiles" / f"{model.digest[:24]}.json"
    try:
        return [StageProfile.from_json(p) for p in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError):
        if model.structure is None:
            return None
    profiles = probe(model, device=device, log=log)
    remember(model, profiles)
    return profiles


def remember(model: Model, profiles: list[StageProfile]) -> None:
    """Keep profiles in the user's cache folder, under the model's digest."""
    footprint.store_json(
        footprint.cache_folder() / "profiles" / f"{model.digest[:24]}.json", [p.to_json() for p in profiles]
    )


def stage_footprint(model: Model, index: int, stage: Stage, log: Callable[[str], None] = lambda _: None) -> Footprint:
    """Measured cost of a stage on this machine (cached)."""

    def run(height: int, width: int) -> Tensor:
        tile = torch.rand(1, stage.inputs, height, width, device=stage.device)
        return stage.run(tile.contiguous(memory_format=torch.channels_last))

    key = ("sr", model.weights_digest(index), str(stage.device), stage.precision)

    def measure() -> Footprint:
        log(f"measuring memory and speed of stage {index + 1} on this machine (once)")
        return footprint.measure(run, stage.device, stage.align)

    return footprint.cached(key, measure)


def precision_errors(
    model: Model,
    stages: int,
    half: str,
    device: torch.device,
    image: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> list[PrecisionError]:
    """Error against float32 of the chain's end when the stages from k on run in ``half``: one for every k (cached)."""
    content = _first_content(model, image)
    place = str(device)
    name = hashlib.sha256(repr((model.digest, stages, half, place, content.sum().item(), torch.__version__)).encode())
    path = footprint.cache_folder() / "precision" / f"{name.hexdigest()[:24]}.json"
    try:
        return [PrecisionError(**e) for e in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        log(f"measuring the error of {half} (once)")
    full, fast = (_chain(model, stages, name, device) for name in ("fp32", half))
    errors = precision.chain_errors(
        [s.network for s in full], [s.network for s in fast], [s.sigma for s in model.stages[:stages]],
        content.to(device), max(s.align for s in full),
    )  # fmt: skip
    footprint.store_json(path, [asdict(e) for e in errors])
    return errors


def _chain(model: Model, stages: int, precision: str, device: torch.device) -> list[Stage]:
    """The stages with networks of their own, one for all that share their weights."""
    made: dict[str, Stage] = {}
    for index, described in enumerate(model.stages[:stages]):
        if described.weights not in made:
            made[described.weights] = Stage(model.new_network(index), device, precision)
    return [made[described.weights] for described in model.stages[:stages]]


def _first_content(model: Model, image: Path | None) -> Tensor:
    """What the first stage takes: the middle of the picture, or a sample of step 1."""
    if image is not None:
        source = PictureSource(image)
        height, width = source.size
        y, x = max(0, height - _MIDDLE) // 2, max(0, width - _MIDDLE) // 2
        return source.read(Box(y, x, min(y + _MIDDLE, height), min(x + _MIDDLE, width)))[None]
    assert model.structure is not None
    return base_image(model.structure, _SEED)[None]


def band_cost(model: Model, index: int, stage: Stage, log: Callable[[str], None] = lambda _: None) -> BandCost:
    """Measured cost of streaming a stage in bands on this machine (cached). Raises UsageError when it cannot be streamed."""
    narrow, wide, wider = (stage.stream_plan(columns * stage.align) for columns in (64, 4096, 8192))
    key = (
        "bands",
        model.weights_digest(index),
        str(stage.device),
        stage.precision,
        str([(s.band, s.block) for s in narrow.segments]),
    )

    def measure() -> Footprint:
        log(f"measuring the speed of stage {index + 1} in bands on this machine (once)")
        return footprint.measure_stream(stage)

    per_column = (wider.nbytes - wide.nbytes) / (wider.width - wide.width)
    return BandCost(
        band=narrow.band,
        bytes_per_column=per_column,
        seconds_per_pixel=footprint.cached(key, measure).seconds_per_pixel,
        fixed=int(wide.nbytes - per_column * wide.width),
        narrow_bytes_per_column=narrow.nbytes / narrow.width,
    )


def structure_footprint(model: Model) -> Footprint:
    """Measured cost of step 1 on the host (cached)."""
    structure = model.structure
    assert structure is not None
    return footprint.cached(
        ("structure", model.digest, "cpu"),
        lambda: footprint.measure(lambda h, w: base_image(structure, 0, (h, w)), torch.device("cpu"), largest=256),
    )
