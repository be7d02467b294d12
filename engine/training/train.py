"""``train_model``: train every step on one photograph and write the model file.

Each step is a run with its own checkpoint in a folder of work files; a finished step is its file there.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.archs.hpvaegan import BASE_WIDTH
from engine.errors import InputError, ResumeError, UsageError, option
from engine.io.files import replacing
from engine.io.photo import Photo, open_photo
from engine.model.build import build
from engine.training.preset import Preset
from engine.training.run.runtime import Runtime
from engine.training.sr.request import PhotoTrainingRequest
from engine.training.sr.train import SCALE, STEPS, SRRequest, file_digest, train_sr
from engine.training.structure.recipe import StructureRecipe
from engine.training.structure.request import StructureRequest
from engine.training.structure.train import train_structure

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
    step's weights. With ``runtime.resume`` a run continues: finished steps are skipped.

    Args:
        photo: the photograph, at least ``BASE_WIDTH`` pixels wide.
        out: model file to write (.safetensors).
        request: everything that decides the model except the photograph.
        runtime: device, memory, resumption and callbacks.

    Returns:
        The folder of work files, which stays.

    Raises:
        UsageError: ``out`` is no .safetensors file.
        ResumeError: the folder of work files belongs to another run.
        InputError, BudgetError, EngineError, Interrupted: as ``train_structure`` and ``train_sr``.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"{option('out', out)}: not a model file; use a name that ends in .safetensors")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; create it or choose another output")
    opened = open_photo(photo, BASE_WIDTH)
    folder = out.with_suffix(".training")
    _claim(folder, _record(opened, request), resume=runtime.resume)
    part_runtime = replace(runtime, resume=True)
    structure = folder / "structure.safetensors"
    if not structure.exists():
        runtime.log("step 1")
        train_structure(photo, structure, _structure_request(request), part_runtime)
    weights: list[Path] = []
    for step in STEPS:
        if step not in trained_steps(opened.width):
            runtime.log(f"step {step} shares the weights of step {step - 1}: the photograph has no more detail for it")
            weights.append(weights[-1])
            continue
        path = folder / f"step{step}.safetensors"
        if not path.exists():
            train_sr(photo, path, _sr_request(request, step, structure, weights), part_runtime)
        weights.append(path)
    build(structure, [str(path) for path in weights]).save(out)
    return folder


def trained_steps(width: int) -> tuple[int, ...]:
    """Super-resolution steps with their own weights for a photograph of ``width`` columns; others share the last one's."""
    return tuple(step for step in STEPS if step == STEPS[0] or width > _output_width(step - 1))


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


def _record(photo: Photo, request: ModelRequest) -> dict[str, Any]:
    """Everything that decides the model, as it is read back from JSON."""
    settings = dataclasses.asdict(request) | {"vgg": file_digest(request.vgg), "photo": photo.digest}
    record: dict[str, Any] = json.loads(json.dumps(settings))
    return record


def _claim(folder: Path, record: dict[str, Any], *, resume: bool) -> None:
    """Create the folder of work files, or check that it belongs to the same run."""
    path = folder / _RECORD
    is_new = not folder.exists() or not any(folder.iterdir())
    if is_new:
        folder.mkdir(exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return
    if not resume:
        raise ResumeError(
            f"{folder}: holds another run; give {option('resume', True)}, delete it or choose another output"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ResumeError(f"{folder}: holds no run to resume; delete it or choose another output") from None
    for key, value in record.items():
        if saved.get(key) != value:
            raise ResumeError(f"{folder}: the run has {key} = {saved.get(key)!r}, not {value!r}; use the same settings")
