"""`train_model`: one photograph becomes a model file: step 1, then every super-resolution step, then the bundle.

Each part is a run of its own with its own checkpoint in the folder of work files; a part that is finished is its file.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.archs.hpvaegan import BASE_WIDTH
from engine.errors import InputError, ResumeError, UsageError
from engine.io.photo import Photo, open_photo
from engine.model.build import build
from engine.training.preset import Preset
from engine.training.sr.request import OfPhotograph
from engine.training.sr.train import SCALE, STEPS, Runtime, file_digest, train_sr
from engine.training.sr.train import Request as StepRequest
from engine.training.structure.train import train_structure

_RECORD = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(OfPhotograph):
    """What to train, for every step alike; `preset` has step 1's table too."""

    preset: Preset

    def __post_init__(self) -> None:
        OfPhotograph.__post_init__(self)
        if self.preset.structure is None:
            raise UsageError("the preset has no table [structure]: take quick or paper, or add the table")


def train_model(photo: Path, out: Path, request: Request, runtime: Runtime) -> Path:
    """Train everything and write the model file `out`. Returns the folder of work files, which stays.

    Steps 3 and 4 are trained only where the photograph has more pixels than the step before saw; otherwise they share
    that step's weights, which the model file then holds once. With `runtime.resume` a run that was begun goes on: finished
    parts are skipped.

    Raises as `train_structure` and `train_sr`; ResumeError if the folder belongs to another run.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: a model file ends in .safetensors")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write {out.name} to")
    opened = open_photo(photo, BASE_WIDTH)
    folder = out.with_suffix(".training")
    _claim(folder, _record(opened, request), runtime.resume)
    structure = folder / "structure.safetensors"
    if not structure.exists():
        runtime.log("step 1: the structure")
        _train_structure(photo, structure, request, runtime)
    trained: list[Path] = []
    for step in STEPS:
        if step not in trained_steps(opened.width):
            runtime.log(
                f"step {step} shares the weights of step {step - 1}: the photograph has no more pixels to show it"
            )
            trained.append(trained[-1])
            continue
        weights = folder / f"step{step}.safetensors"
        if not weights.exists():
            recipe = request.preset.step(step)
            wanted = StepRequest(
                recipe=recipe,
                step=step,
                structure=structure,
                previous=tuple(trained) if recipe.chain else (),
                **{field.name: getattr(request, field.name) for field in dataclasses.fields(OfPhotograph)},
            )
            train_sr(photo, weights, wanted, replace(runtime, resume=True))
        trained.append(weights)
    build(structure, [str(path) for path in trained]).save(out)
    return folder


def trained_steps(width: int) -> tuple[int, ...]:
    """Which steps get weights of their own from a photograph of so many columns; the others share those of the last."""
    return tuple(step for step in STEPS if step == STEPS[0] or width > _output_width(step - 1))


def _train_structure(photo: Path, out: Path, request: Request, runtime: Runtime) -> None:
    recipe = request.preset.structure
    assert recipe is not None
    train_structure(
        photo,
        out,
        **recipe.run(),
        vgg=request.vgg,
        device=runtime.device,
        precision=request.precision,
        seed=request.seed,
        resume=True,
        licence=request.licence,
        source=request.source,
        on_event=runtime.on_event,
    )


def _output_width(step: int) -> int:
    return BASE_WIDTH * int(SCALE ** (step - 1))


def _record(photo: Photo, request: Request) -> dict[str, Any]:
    """All that decides the outcome, as JSON gives it back."""
    settings = dataclasses.asdict(request) | {"vgg": file_digest(request.vgg), "photo": photo.digest}
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def _claim(folder: Path, record: dict[str, Any], resume: bool) -> None:
    """The folder of this run, new or its own."""
    path = folder / _RECORD
    is_new = not folder.exists() or not any(folder.iterdir())
    if is_new or not resume:
        if not is_new:
            raise ResumeError(f"{folder}: holds another run: resume it, delete the folder, or choose another output")
        folder.mkdir(exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(part, path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ResumeError(f"{folder}: no run to resume in this folder: delete it or choose another output") from None
    for key, value in record.items():
        if found.get(key) != value:
            raise ResumeError(f"{folder}: the run has {key} = {found.get(key)!r}, not {value!r}: use the same settings")
