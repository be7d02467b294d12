"""The command ``engine models``: what is at hand to render and to enlarge with, and how it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.cli import report
from engine.cli.progress import meter
from engine.cli.tables import print_table
from engine.errors import EngineError, InputError, ModelError
from engine.geometry import UNBOUNDED
from engine.model.bundle import DEFAULT, Model, load
from engine.model.checkpoints import READERS
from engine.model.packaged import PACKAGED, find_packaged
from engine.model.weight_files import WEIGHTS, weights_folder
from engine.plan.halo import SEAM_TOLERANCE
from engine.probe.profiles import known_profiles
from engine.run.stage import StageFactory

_DEFAULT_NAME = "(default)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model, or a file that is none."""

    name: str
    """Name or path that commands take."""
    path: str | None
    """File; None for weights that are not on this machine."""
    step_1: bool = False
    """Whether it generates images of its own."""
    scales: tuple[int, ...] = ()
    """Enlargement of each super-resolution step."""
    architectures: tuple[str, ...] = ()
    """Architectures of the steps, each once."""
    runs: tuple[str, ...] = ()
    """Executors that can run every step: bands, where the networks stream row by row, and tiles."""
    halo: int | None = None
    """One-sided receptive field of the widest step in pixels of its input: the halo of exact tiles. None if unknown."""
    auto_halo: int | None = None
    """Halo within the seam tolerance, where it was measured."""
    licences: tuple[str, ...] = ()
    """Licences of its parts, each once."""
    problem: str | None = None
    """Reason for which it cannot be used."""


def show(places: Sequence[Path], *, as_json: bool) -> None:
    """Print the models that come with the engine, the fetched ones, and those of files and folders.

    Raises:
        InputError: no such file or folder, or a folder without a checkpoint.
    """
    names = list(_names(places))
    entries = []
    with meter("reading models", len(names)) as bar:
        for name in names:
            entries.append(_entry(name))
            bar.advance(1, name)
    if as_json:
        report.print_json([asdict(entry) for entry in entries])
        return
    rows = [_row(entry) for entry in entries]
    print_table(("model", "scale", "architecture", "runs in", "halo", "licence or problem"), rows)


def _names(places: Sequence[Path]) -> Iterator[str]:
    """Names and paths of all models, each once: packaged ones, networks with names, the engine's folder, the places."""
    seen: set[str] = set()
    known = {name for file in WEIGHTS.values() for name in (*file.names, *(Path(m).name for m in file.members or ()))}
    own = weights_folder()
    others = [path for path in _checkpoints(own) if path.name not in known] if own.is_dir() else []
    given = [path for place in places for path in _of_place(place)]
    packaged = [str(DEFAULT), *map(str, sorted(DEFAULT.parent.glob("*.safetensors")))]
    for name in (*packaged, *PACKAGED, *map(str, (*others, *given))):
        if (real := os.path.realpath(name)) not in seen:
            seen.add(real)
            yield name


def _of_place(place: Path) -> list[Path]:
    if place.is_dir():
        found = _checkpoints(place)
        if not found:
            raise InputError(f"{place}: no checkpoint in this folder ({', '.join(READERS)}); name another")
        return found
    if not place.exists():
        raise InputError(f"{place}: no such file or folder; name a checkpoint or a folder of them")
    return [place]


def _checkpoints(folder: Path) -> list[Path]:
    """Files of a folder with the suffix of a checkpoint; of ncnn's pairs the first file."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in READERS and p.is_file())
    return [p for p in files if not (p.suffix.lower() == ".bin" and p.with_suffix(".param").is_file())]


def _entry(name: str) -> Entry:
    """Description of one model; a file that cannot be used is described by its problem."""
    shown = _DEFAULT_NAME if name == str(DEFAULT) else name
    try:
        path = find_packaged(name) if name in PACKAGED else Path(name)
    except ModelError as error:
        return Entry(name=name, path=None, problem=error.for_command_line().removeprefix(f"{name}: "))
    try:
        return _of_model(shown, path, load(name))
    except EngineError as error:
        return Entry(name=shown, path=str(path), problem=error.for_command_line().removeprefix(f"{path}: "))


def _of_model(name: str, path: Path, model: Model) -> Entry:
    profiles = known_profiles(model) or ()
    points = [profile.halo_within(SEAM_TOLERANCE) for profile in profiles]
    measured = [point.halo for point in points if point is not None]
    stages = StageFactory(model, torch.device("cpu")).stages(["fp32"] * len(model.stages))
    radius = max((stage.radius for stage in stages), default=None)
    return Entry(
        name=name,
        path=str(path),
        step_1=model.base_generator is not None,
        scales=tuple(stage.scale for stage in model.stages),
        architectures=_once(stage.architecture for stage in model.stages),
        runs=("bands", "tiles") if all(stage.can_stream for stage in stages) else ("tiles",),
        halo=radius if radius and radius < UNBOUNDED else None,
        auto_halo=max(measured) if points and len(measured) == len(points) else None,
        licences=_once(licence.partition(":")[0] for licence in model.manifest.licences),
    )


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _row(entry: Entry) -> tuple[str, ...]:
    """A line of the table."""
    if entry.problem is not None:
        return entry.name, "-", "-", "-", "-", entry.problem
    scale = " ".join(f"x{scale}" for scale in entry.scales)
    halos = {"exact": entry.halo, "auto": entry.auto_halo}
    return (
        entry.name,
        f"step 1, {scale}" if entry.step_1 else scale,
        ", ".join(entry.architectures),
        ", ".join(entry.runs),
        ", ".join(f"{size} {name}" for name, size in halos.items() if size is not None) or "-",
        ", ".join(_once(_short(part) for licence in entry.licences for part in licence.split(";"))),
    )


def _short(licence: str) -> str:
    """A licence without the remark who declares it."""
    return licence.partition("(as declared")[0].strip()
