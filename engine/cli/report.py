"""Plans, models, measurements and finished renders as tables on stdout, and as JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from engine.cli.outputs import check_place
from engine.cli.progress import clock
from engine.cli.tables import MAX_TEXT, print_table
from engine.errors import UsageError, counted, option, printable
from engine.geometry import UNBOUNDED
from engine.io.files import replacing
from engine.model.bundle import Model
from engine.plan.cost import CHANNELS, Projection, readable
from engine.plan.halo import SEAM_TOLERANCE, largest
from engine.plan.make import seam_errors
from engine.plan.measured import Measured, MeasuredStage, PrecisionError, SeamPoint, StageProfile
from engine.plan.parts import Part, Shares
from engine.plan.plan import Plan
from engine.plan.print_size import PrintSize, material_size
from engine.plan.stage import StagePlan, step_of
from engine.plan.tiles import is_whole
from engine.result import RenderResult
from engine.run.stage import StageFactory
from engine.version import __version__

_PLOT_SUFFIXES = (".png", ".svg")

_out = Console(highlight=False)


def print_json(data: object) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def line(line: str) -> None:
    """One line on stdout, which a terminal may break anywhere: for names and commands to be copied."""
    sys.stdout.write(printable(line, MAX_TEXT) + "\n")


def text(text: str) -> None:
    """Lines of this package's own text on stdout, as they are: for files."""
    sys.stdout.write(text)


def prose(line: str) -> None:
    """One line on stdout, broken between words where a terminal is narrower."""
    _out.print(printable(line, MAX_TEXT), markup=False, emoji=False, soft_wrap=not _out.is_terminal)


def file_size(size: int) -> str:
    """Bytes of a file for people: "1.2 MB", "340.0 kB", "10 bytes"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return counted(size, "byte")


def part_of(size: int, limit: int) -> str:
    """A size and its limit: "0.42 of 8.00 GiB", "12.0 MiB of 1.00 GiB"."""
    (number, _, unit), (_, _, other) = readable(size).partition(" "), readable(limit).partition(" ")
    return f"{number if unit == other else readable(size)} of {readable(limit)}"


def device_text(projection: Projection) -> str:
    """Memory of a device: "0.42 GiB", "0.42 GiB (0.67 GiB where values overflow)"."""
    more = f" ({readable(projection.device_in_fp32)} where values overflow)"
    return readable(projection.device) + more * (projection.device_in_fp32 > projection.device)


def plan_json(plan: Plan, projection: Projection, measured: Measured) -> dict[str, Any]:
    """A plan with its projection, for machines."""
    error, budget = measured.precision_error, measured.budget
    return {
        "plan": plan.to_json(),
        "digest": plan.digest,
        "seam_error_levels": largest(seam_errors(plan, measured)),
        "keeps_scene": measured.canvas.keeps_scene,
        "precision_error_levels": asdict(error) if error else None,
        "whole_error_levels": [asdict(s.whole_error) if s.whole_error else None for s in measured.stages],
        "projection": projection.to_json(),
        "budget": {"host": budget.host, "device": budget.device, "disk": budget.disk},
    }


def part_json(plan: Plan, measured: Measured, part: Part) -> dict[str, Any]:
    """A part of a render and its cost, for machines."""
    shares = Shares.of(plan, measured, part.count)
    writes = shares.writes(plan, part)
    boxes = writes.rectangles
    return {
        "number": part.number,
        "count": part.count,
        "shards": sum(plan.grid().covered(box).area for box in boxes),
        "rows": [min(box.y0 for box in boxes), max(box.y1 for box in boxes)] if boxes else None,
        "overhead": shares.overhead(plan, measured),
    }


def print_part(plan: Plan, measured: Measured, part: Part) -> None:
    """A part of a render and its cost, for people."""
    account = part_json(plan, measured, part)
    rows = account["rows"]
    place = f", rows {rows[0]} to {rows[1] - 1}" if rows else ""
    prose(
        f"part {part}: {account['shards']} of {counted(len(plan.grid()), 'shard')}{place}; "
        f"{counted(part.count, 'part')} together take {account['overhead']:.1%} more work than one run"
    )


def precision_text(error: PrecisionError) -> str:
    """The error of half precision in words."""
    return (
        f"error against fp32 {error.mean:.2f} levels on average, {error.p999:.2f} for 99.9 %, {error.max:.2f} at most, "
        "measured on a sample"
    )


def seam_text(error: float | None) -> str:
    """A seam error in words."""
    return "exact" if error == 0 else "not measured" if error is None else f"at most {error:.2f} levels where measured"


def wrap_text(wrap: str | None) -> str:
    """Axes along which an image repeats, before further facts: "tileable along x, "; empty if there are none."""
    return "" if wrap is None else f"tileable along {'x and y' if wrap == 'both' else wrap}, "


def print_plan(
    plan: Plan,
    projection: Projection,
    measured: Measured,
    *,
    model: str,
    picture: tuple[Path, tuple[int, int]] | None = None,
    verbose: bool = False,
) -> None:
    """A plan with its projection, for people: what, how and at which cost; with ``verbose`` in detail.

    Args:
        plan, projection, measured: the plan and its cost.
        model: name of the model.
        picture: file and (height, width) of the picture to enlarge, in place of step 1.
        verbose: print the steps, the parts of the memory and the layout of the store as well.
    """
    budget = measured.budget
    prose(f"{what(plan, measured, picture)}, by {model}")
    prose(
        f"{plan.executor}, {plan.precision}, {wrap_text(plan.wrap)}seam error "
        f"{seam_text(largest(seam_errors(plan, measured)))}{_region(plan, measured)}"
    )
    device = "" if budget.device is None else f", device memory {part_of(projection.device, budget.device)}"
    scratch = f" and {readable(projection.scratch)} of scratch" if projection.scratch else ""
    place = "disk" if budget.holds_store else "object store"
    prose(
        f"memory {part_of(projection.host, budget.host)}{device}, {place} at most {readable(projection.disk)}{scratch}, "
        f"time about {clock(projection.seconds)}"
    )
    for stage, facts in zip(plan.stages, measured.stages, strict=True):
        if (text := whole_text(stage, facts)) is not None:
            prose(f"{stage.name}: {text}")
    if verbose:
        _print_details(plan, projection, measured)


def whole_text(stage: StagePlan, facts: MeasuredStage) -> str | None:
    """How the tiles of a network that looks at the whole picture differ from it; None for other networks and plans."""
    error = facts.whole_error
    if error is None or is_whole(stage):
        return None
    how = (
        "statistics of the whole picture as constants" if stage.statistics else "tiles, which see a part of the picture"
    )
    height, width = error.shape
    return (
        f"{how}; error against the whole picture {error.mean:.2f} levels on average, {error.max:.2f} at most, measured on "
        f"{width}x{height} px of it"
    )


def megapixels(pixels: int) -> str:
    """A number of pixels for people: "21.2 megapixels", "0.015 megapixels"."""
    return f"{pixels / 1e6:.1f} megapixels" if pixels >= 100_000 else f"{pixels / 1e6:.2g} megapixels"


def print_on_paper(size: tuple[int, int], dpi: float | None) -> None:
    """The size of an image of (height, width) on paper, and for a square one the size that a material takes."""
    height, width = size
    prose(f"print {PrintSize.of(size, dpi)}, {megapixels(width * height)}")
    print_material(size)


def print_material(size: tuple[int, int], *, repeats: bool = False) -> None:
    """The size that a material takes, where an image of (height, width) is or may be one of another size."""
    if (better := material_size(size, repeats=repeats)) is not None:
        prose(f"for a material, take a power of two: --size {better[1]}x{better[0]}")


def what(plan: Plan, measured: Measured, picture: tuple[Path, tuple[int, int]] | None) -> str:
    """Size, seed and origin of the image."""
    (height, width), base = plan.size, plan.scene
    size = f"{width}x{height}"
    if not plan.is_whole:
        size += f" at {plan.roi.x0},{plan.roi.y0} of {plan.canvas[1]}x{plan.canvas[0]}"
    if plan.enlarged is not None:
        size += f" reduced from {plan.enlarged[1]}x{plan.enlarged[0]}"
    if not plan.pixels.is_plain:
        size += f", {plan.pixels}"
    if picture is None:
        scene = "" if measured.canvas.keeps_scene else " for this size, so the scene differs from other sizes"
        return f"{size}, seed {plan.seed}{gain_text(plan.noise_gain)}, from a base of {base[1]}x{base[0]}{scene}"
    path, native = picture
    resized = "" if base == native else f", resized to {base[1]}x{base[0]}"
    noise = any(stage.sigma or stage.inputs > CHANNELS for stage in measured.stages)
    seed = f", seed {plan.seed}{gain_text(plan.noise_gain)}" if noise else ""
    return f"{size}{seed}, from {path.name} ({native[1]}x{native[0]}{resized})"


def gain_text(gains: object) -> str:
    """Factors of noise channels, for all steps or one per step, behind the seed; empty without, and for damaged ones."""
    if not isinstance(gains, list | tuple) or not gains or not all(isinstance(gain, int | float) for gain in gains):
        return ""
    return f", noise gain {','.join(f'{gain:g}' for gain in (gains if len(set(gains)) > 1 else gains[:1]))}"


def _region(plan: Plan, measured: Measured) -> str:
    """How the pixels of a region compare with those of a whole render: bands are cut at other columns, tiles are not."""
    if plan.is_whole:
        return ""
    error = largest(seam_errors(plan, measured))
    if not plan.is_banded or (error == 0 and set(plan.precision.split(",")) == {"fp32"}):
        return "; pixels equal the whole render's"
    if error == 0:
        return f"; pixels equal the whole render's up to rounding in {plan.precision}"
    return "; pixels differ from the whole render's by seam error and rounding (equal with --overlap exact --precision fp32)"


def _print_details(plan: Plan, projection: Projection, measured: Measured) -> None:
    """The steps, their layout, and the parts of the cost."""
    margin = f" with a margin of {plan.margin}" if plan.margin else ""
    prose(f"{counted(len(plan.stages), 'enlargement')} of {plan.base[1]}x{plan.base[0]}{margin}, on {plan.backend}")
    _print_steps(plan, projection, measured)
    last, budget = plan.stages[-1], measured.budget
    if last.blend:
        prose(f"tiles of {last.name} are cross-faded over {last.blend * last.scale} px ({last.ramp})")
    if max(projection.batches, default=1) > 1:
        prose(f"batches of {', '.join(map(str, projection.batches))} tiles")
    if measured.precision_error is not None:
        prose(precision_text(measured.precision_error))
    shard, chunk = ("x".join(map(str, dict.fromkeys(sides[::-1]))) for sides in (plan.shard, plan.chunk))
    prose(f"store: shards {shard} px, chunks {chunk} px, {counted(len(plan.pyramid), 'level')}")
    parts = ", ".join(f"{name} {readable(size)}" for name, size in projection.host_parts.items())
    prose(f"memory: idle {readable(projection.baseline)}, {parts}")
    if projection.device_in_fp32 > projection.device:
        prose(f"device memory {device_text(projection)}")
    prose(f"free disk {readable(budget.disk)}")


def _print_steps(plan: Plan, projection: Projection, measured: Measured) -> None:
    shape, count = ("band", "strips") if plan.is_banded else ("tile", "tiles")
    inputs = plan.input_columns(next(plan.column_strips())) if plan.is_banded else ()
    rows = []
    for index, (stage, error, tasks) in enumerate(
        zip(plan.stages, seam_errors(plan, measured), projection.tasks, strict=True)
    ):
        seam = "exact" if error == 0 else "not measured" if error is None else f"{error:.2f} levels"
        height, width = (stage.band, inputs[index][1] - inputs[index][0]) if plan.is_banded else stage.tile_shape
        rows.append(
            (f"{stage.step}", f"{stage.width}x{stage.height}", f"{width}x{height}", f"{stage.halo}", seam, f"{tasks}")
        )
    print_table(("step", "input", shape, "halo", "seam error", count), rows)


def model_json(model: Model) -> dict[str, Any]:
    """A model file, for machines."""
    manifest: dict[str, Any] = json.loads(model.manifest.to_json())
    for stage in manifest["stages"]:
        stage["parameters"] = model.parameters(stage["weights"])
    if manifest["structure"]:
        manifest["structure"]["parameters"] = model.parameters("structure")
    return {"kind": "model", "path": str(model.path), "bytes": model.path.stat().st_size, **manifest}


def print_model(model: Model) -> None:
    """A model file, for people."""
    prose(f"{model.path}: {file_size(model.path.stat().st_size)}, digest {model.digest[:16]}")
    if (generator := model.base_generator) is not None:
        height, width = generator.base_size
        prose(
            f"step 1: {(model.manifest.structure or {})['architecture']}, {counted(len(generator.sizes), 'scale')} up to "
            f"{width}x{height}, {model.parameters('structure'):,} parameters, margin {model.manifest.margin} px"
        )
    rows = []
    for index, stage in enumerate(model.stages):
        point = stage.profile.halo_within(SEAM_TOLERANCE) if stage.profile else None
        halo = (
            "not measured"
            if stage.profile is None
            else "exact"
            if point is None
            else f"{point.halo} ({point.max:.2f} levels)"
        )
        channels = str(model.network(index).noise_channels)
        gain = f" x {stage.noise_gain:g}" if stage.noise_gain != 1 else ""
        rows.append((
            str(step_of(index)), f"{stage.architecture} x{stage.scale}", f"{model.parameters(stage.weights):,}",
            stage.weights, f"{stage.sigma:g}", channels + gain, halo,
        ))  # fmt: skip
    print_table(("step", "architecture", "parameters", "weights", "noise", "+ channels", "auto halo"), rows)
    print_licences(model.manifest.licences)


def print_licences(licences: Sequence[str]) -> None:
    """Licences of the parts of a model. A part without a stated source has nothing behind the licence's name."""
    for licence in licences:
        prose(f"licence: {licence.strip().removesuffix(':')}")


def profiles_json(model: Model, profiles: list[StageProfile]) -> dict[str, Any]:
    """Profiles of all steps, for machines."""
    steps = [
        {"step": step_of(i), "radius": _radius(model, i), "align": model.network(i).align, **p.to_json()}
        for i, p in enumerate(profiles)
    ]
    return {"path": str(model.path), "steps": steps}


def _radius(model: Model, index: int) -> int | None:
    """Theoretical receptive field of a step in LR pixels, one-sided; None if it is not known."""
    radius = StageFactory(model, torch.device("cpu")).stage(index, "fp32").radius
    return radius if radius < UNBOUNDED else None


def print_profiles(model: Model, profiles: list[StageProfile]) -> None:
    """Profiles of all stages, for people."""
    for index, profile in enumerate(profiles):
        radius = _radius(model, index)
        field = "not known" if radius is None else f"{radius} px one-sided"
        prose(f"step {step_of(index)}: {model.stages[index].architecture}, measured on {profile.content}")
        prose(f"  theoretical receptive field: {field}; tile origins on a grid of {model.network(index).align} px")
        for name, radii in (("|g|", profile.erf_abs), ("g^2", profile.erf_square)):
            shares = ", ".join(f"{float(f):.1%} {r} px" for f, r in radii.items()) or "larger than the crop"
            prose(f"  effective receptive field by {name}: {shares}")
        prose("  seam error in levels of 255:")
        rows = [(str(p.halo), f"{p.mean:.2f}", f"{p.p999:.2f}", f"{p.max:.2f}") for p in _thinned(profile)]
        print_table(("halo", "mean", "99.9 %", "max"), rows)
        chosen = profile.halo_within(SEAM_TOLERANCE)
        prose(
            f"  overlap auto: {'exact' if chosen is None else f'{chosen.halo} px, largest error {chosen.max:.2f} levels'}"
        )


def _thinned(profile: StageProfile) -> list[SeamPoint]:
    """Every fourth point, the last point, and the automatic choice."""
    chosen = profile.halo_within(SEAM_TOLERANCE)
    last = len(profile.seam) - 1
    return [p for i, p in enumerate(profile.seam) if i % 4 == 0 or i == last or p == chosen]


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be drawn at the end. Raises UsageError."""
    check_place("plot", path)
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        suffixes = " or ".join(_PLOT_SUFFIXES)
        raise UsageError(f"{option('plot', path)}: unknown suffix; name a file that ends in {suffixes}")
    if util.find_spec("matplotlib") is None:
        raise UsageError(f"{option('plot')}: matplotlib is not installed; pip install 'ourgan-engine[plot]'")


def plot_profiles(profiles: list[StageProfile], path: Path) -> None:
    """Plot seam error against halo, one colour for each step, with the ERF radii as vertical lines."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, profile in enumerate(profiles):
        colour = colormaps["tab10"](index)
        halos = [p.halo for p in profile.seam]
        for name, style in (("max", "-"), ("p999", "--"), ("mean", ":")):
            values = [max(getattr(p, name), 1e-3) for p in profile.seam]
            axes.plot(halos, values, style, color=colour, label=f"step {step_of(index)}, {name}")
        for radii, style in ((profile.erf_abs, "-"), (profile.erf_square, ":")):
            if "0.98" in radii:
                axes.axvline(radii["0.98"], color=colour, linestyle=style, linewidth=0.8)
    axes.axhline(SEAM_TOLERANCE, color="black", linewidth=0.8, label="default tolerance")
    axes.set(xlabel="halo (low-resolution pixels); vertical: 98 % ERF by |g| (solid) and g^2 (dotted)",
             ylabel="seam error (levels of 255)", yscale="log")  # fmt: skip
    axes.legend(fontsize="small")
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format=path.suffix[1:].lower())


def run_report(result: RenderResult, measured: Measured) -> dict[str, Any]:
    """A finished render, for machines."""
    machine = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
    }
    return {
        "engine": __version__,
        **plan_json(result.plan, result.projection, measured),
        "measured": asdict(result.measurements),
        "machine": machine,
    }
