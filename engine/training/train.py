"""``train_model``: train every step on one photograph and write the model file.

Each step is a part with its own checkpoint in a folder of work files; a finished part is its file there. All parts are checked
before the folder is made. ``run.json`` there holds the settings of each part, written when the part begins.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from engine.archs.hpvaegan import BASE_WIDTH, BaseGenerator
from engine.causes import raise_if_exhausted
from engine.errors import InputError, ResumeError, UsageError, option
from engine.io.files import replacing
from engine.io.photo import Photo, open_photo
from engine.model.build import build
from engine.training.losses.vgg import find_vgg
from engine.training.preset import Preset
from engine.training.run.checkpoint import checkpoint_path, difference
from engine.training.run.events import Forecast
from engine.training.run.runtime import Runtime
from engine.training.run.trial import announce
from engine.training.sr.losses import feature_layers
from engine.training.sr.request import PhotoTrainingRequest
from engine.training.sr.train import (
    SCALE,
    STEPS,
    SRRequest,
    check_sr,
    file_digest,
    forecast_sr,
    open_network,
    previous_step,
    train_sr,
)
from engine.training.structure.recipe import StructureRecipe
from engine.training.structure.request import StructureRequest
from engine.training.structure.train import (
    check_structure,
    forecast_structure,
    train_structure,
    untrained_structure,
)

_RECORD = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest(PhotoTrainingRequest):
    """Everything that decides the model except the photograph. Raises UsageError for a preset without step 1."""

    preset: Preset
    """Recipes of all steps."""

    def __post_init__(self) -> None:
        PhotoTrainingRequest.__post_init__(self)
        _structure_recipe(self.preset)


def train_model(photo: Path, out: Path, request: ModelRequest, runtime: Runtime) -> Path:
    """Train step 1 and the super-resolution steps, and write the model file.

    Steps 3 and 4 are trained only if the photograph has more pixels than the step below outputs; otherwise they share that
    step's weights. With ``runtime.resume`` a run continues: finished steps are skipped. Steps that have not begun take the
    settings of the request; steps that have begun must have the same ones. Nothing is written before all checks have passed.

    Args:
        photo: the photograph, at least ``BASE_WIDTH`` pixels wide.
        out: model file to write (.safetensors).
        request: everything that decides the model except the photograph.
        runtime: device, memory, resumption and callbacks.

    Returns:
        The folder of work files, which stays.

    Raises:
        UsageError: ``out`` is no .safetensors file.
        ResumeError: the folder of work files belongs to another run, or a step has begun with other settings.
        InputError, BudgetError, EngineError, Interrupted: as ``train_structure`` and ``train_sr``.
    """
    _check_out(out)
    opened = open_photo(photo, BASE_WIDTH)
    folder = out.with_suffix(".training")
    parts = _parts(opened, folder, request)
    record = _read_record(folder, resume=runtime.resume)
    _check_settings(parts, record, folder)
    unfinished = [part for part in parts if not part.out.exists()]
    if out.exists() and not runtime.overwrite and not (record and unfinished):  # the start of that run was allowed to
        raise InputError(f"{out}: exists; give {option('overwrite', True)} to replace it, or another {option('out')}")
    forecasts = _try(unfinished, out.parent, runtime)
    folder.mkdir(exist_ok=True)
    part_runtime = replace(runtime, resume=True)
    for part in unfinished:
        record[part.name] = part.settings
        with replacing(folder / _RECORD) as file:
            file.write_text(json.dumps(record, indent=1), encoding="utf-8")
        runtime.log(part.name)
        part.train(part_runtime, forecasts[part.name])
    weights = [str(part.out) for part in parts[1:]]
    for step in STEPS[len(weights) :]:
        runtime.log(f"step {step} shares the weights of step {step - 1}: the photograph has no more detail for it")
        weights.append(weights[-1])
    build(parts[0].out, weights).save(out)
    return folder


def trained_steps(width: int) -> tuple[int, ...]:
    """Super-resolution steps with their own weights for a photograph of ``width`` columns; others share the last one's."""
    return tuple(step for step in STEPS if step == STEPS[0] or width > _output_width(step - 1))


class _Part(Protocol):
    """One step of a run."""

    @property
    def name(self) -> str:
        """Name of the step in messages."""

    @property
    def out(self) -> Path:
        """Its file in the folder of work files."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides its result."""

    def check(self, runtime: Runtime) -> None:
        """Check everything that its training needs."""

    def forecast(self, runtime: Runtime) -> Forecast:
        """Measure its iterations."""

    def train(self, runtime: Runtime, forecast: Forecast) -> None:
        """Train it and write its file."""


@dataclass(frozen=True, slots=True)
class _StructurePart:
    photo: Photo
    out: Path
    request: StructureRequest
    name: str = "step 1"

    @property
    def settings(self) -> dict[str, Any]:
        vgg = _vgg_digest(self.request.vgg, self.request.recipe.loss_weights.layers)
        return _settings(self.request, self.photo, vgg, networks=None)

    def check(self, runtime: Runtime) -> None:
        check_structure(self.photo, self.request, runtime)

    def forecast(self, runtime: Runtime) -> Forecast:
        return forecast_structure(self.photo, self.out, self.request, runtime)

    def train(self, runtime: Runtime, forecast: Forecast) -> None:
        train_structure(self.photo.path, self.out, self.request, runtime, forecast)


@dataclass(frozen=True, slots=True)
class _SRPart:
    photo: Photo
    out: Path
    request: SRRequest
    structure: BaseGenerator
    """Step 1 with fresh weights."""
    below: tuple[SRRequest, ...]
    """Requests of the steps below."""

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def settings(self) -> dict[str, Any]:
        vgg = _vgg_digest(self.request.vgg, feature_layers(self.request.recipe))
        return _settings(self.request, self.photo, vgg, structure=None, previous=None)

    def check(self, runtime: Runtime) -> None:
        check_sr(self.photo, self.request, runtime, self.structure.base_size)

    def forecast(self, runtime: Runtime) -> Forecast:
        starts = [open_network(one.start, one.shape, one.seed, one.recipe, one.step - STEPS[0]) for one in self.below]
        previous = [previous_step(start, self.request.precision, runtime.device) for start in starts]
        return forecast_sr(self.photo, self.out, self.request, runtime, self.structure, previous)

    def train(self, runtime: Runtime, forecast: Forecast) -> None:
        train_sr(self.photo.path, self.out, self.request, runtime, forecast)


def _parts(photo: Photo, folder: Path, request: ModelRequest) -> list[_Part]:
    """Step 1 and every super-resolution step with its own weights, in the order of training."""
    structure = _StructurePart(photo, folder / "structure.safetensors", _structure_request(request))
    untrained = untrained_structure(photo, structure.request)
    parts: list[_SRPart] = []
    for step in trained_steps(photo.width):
        sr_request = _sr_request(request, step, structure.out, [part.out for part in parts])
        below = tuple(part.request for part in parts)
        parts.append(_SRPart(photo, folder / f"step{step}.safetensors", sr_request, untrained, below))
    return [structure, *parts]


def _try(parts: Sequence[_Part], folder: Path, runtime: Runtime) -> dict[str, Forecast]:
    """Check all parts, then measure them; returns the forecasts by the parts' names."""
    if not parts:
        return {}
    runtime.log("checking the settings and measuring iterations of each step")
    for part in parts:
        part.check(runtime)
    forecasts = {part.name: part.forecast(runtime) for part in parts}
    announce(list(forecasts.values()), folder, runtime)
    return forecasts


def _structure_recipe(preset: Preset) -> StructureRecipe:
    if preset.structure is None:
        raise UsageError("preset: has no table [structure]; use quick or paper, or add the table")
    return preset.structure


def _structure_request(request: ModelRequest) -> StructureRequest:
    return StructureRequest(
        recipe=_structure_recipe(request.preset),
        precision=request.precision,
        seed=request.seed,
        vgg=request.vgg,
        licence=request.licence,
        source=request.source,
    )


def _sr_request(request: ModelRequest, step: int, structure: Path, previous: list[Path]) -> SRRequest:
    recipe = request.preset.step(step)
    return SRRequest(
        recipe=recipe,
        step=step,
        structure=structure,
        previous=tuple(previous) if recipe.chain else (),
        start=request.start,
        shape=request.shape,
        precision=request.precision,
        seed=request.seed,
        vgg=request.vgg,
        licence=request.licence,
        source=request.source,
    )


def _output_width(step: int) -> int:
    return BASE_WIDTH * int(SCALE ** (step - 1))


def _check_out(out: Path) -> None:
    """Check that the model file and its folder of work files can be written."""
    if out.suffix != ".safetensors":
        raise UsageError(f"{option('out', out)}: not a model file; use a name that ends in .safetensors")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; create it or choose another output")
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out.parent}: cannot be written; choose another output")


def _vgg_digest(path: Path | None, layers: Sequence[str]) -> str | None:
    """SHA-256 of the VGG weights that a step uses; None if it needs none or there are none."""
    return file_digest(path or find_vgg(tuple(layers))) if layers else None


def _settings(request: StructureRequest | SRRequest, photo: Photo, vgg: str | None, **left_out: None) -> dict[str, Any]:
    """The settings of a step as they are read back from JSON, without fields that follow from the others."""
    settings = dataclasses.asdict(request) | {"photo": photo.digest, "vgg": vgg}
    settings = {key: value for key, value in settings.items() if key not in left_out}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _read_record(folder: Path, *, resume: bool) -> dict[str, Any]:
    """Settings of the steps that have begun, by name; empty without a folder of work files."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file, and the work files go there; delete it or choose another output")
    if not resume:
        raise ResumeError(
            f"{folder}: holds another run; give {option('resume', True)}, delete it or choose another output"
        )
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise_if_exhausted(error)
        record = None
    if not isinstance(record, dict):
        raise ResumeError(f"{folder}: holds no run to resume; delete it or choose another output")
    return record


def _check_settings(parts: Sequence[_Part], record: Mapping[str, Any], folder: Path) -> None:
    """Refuse other settings of a step that has begun. A finished step needs no VGG any more, so another one is fine."""
    unfinished: _Part | None = None
    for part in parts:
        finished = part.out.exists()
        if finished or checkpoint_path(part.out).exists():
            again = f"delete {part.out.stem}.* in {folder} to train {part.name} again"
            if unfinished is not None:
                raise ResumeError(f"{folder}: {part.name} has begun without a finished {unfinished.name}; {again}")
            recorded = record.get(part.name)
            if not isinstance(recorded, dict):
                raise ResumeError(f"{folder}: {part.name} has begun with settings that were not recorded; {again}")
            settings = {key: value for key, value in part.settings.items() if not (finished and key == "vgg")}
            if (found := difference(recorded, settings)) is not None:
                raise ResumeError(f"{folder}: {part.name} has begun with {found}; use its value again, or {again}")
        if not finished:
            unfinished = unfinished or part
