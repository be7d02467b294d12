"""Plans, models, measurements and finished renders as tables on stdout, and as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from engine.cli.progress import clock
from engine.errors import UsageError, option
from engine.job import RenderResult
from engine.model.bundle import Model
from engine.plan.cost import Projection, readable
from engine.plan.halo import SEAM_TOLERANCE, largest
from engine.plan.make import seam_errors
from engine.plan.measured import Measured, PrecisionError, SeamPoint, StageProfile
from engine.plan.plan import Plan, step_of
from engine.version import __version__

_PLOT_SUFFIXES = (".png", ".svg")

_out = Console(highlight=False, soft_wrap=True)


def print_json(data: object) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def line(text: str) -> None:
    """One line on stdout."""
    sys.stdout.write(text + "\n")


def plan_json(plan: Plan, projection: Projection, measured: Measured) -> dict[str, Any]:
    """A plan with its projection, for machines."""
    error, budget = measured.precision_error, measured.budget
    return {
        "plan": plan.to_json(),
        "digest": plan.digest,
        "seam_error_levels": largest(seam_errors(plan, measured)),
        "precision_error_levels": asdict(error) if error else None,
        "projection": projection.to_json(),
        "budget": {"host": budget.host, "device": budget.device, "disk": budget.disk},
    }


def precision_text(error: PrecisionError) -> str:
    """The error of half precision in words."""
    return (
        f"error against fp32 {error.mean:.2f} levels on average, {error.p999:.2f} for 99.9 %, {error.max:.2f} at most, "
        "measured on a sample"
    )


def seam_text(error: float | None) -> str:
    """A seam error in words."""
    return "exact" if error == 0 else "not measured" if error is None else f"at most {error:.2f} levels where measured"


def print_plan(plan: Plan, projection: Projection, measured: Measured) -> None:
    """A plan with its projection, for people."""
    height, width = plan.size
    margin = f" (margin {plan.margin})" if plan.margin else ""
    stages = "1 enlargement" if len(plan.stages) == 1 else f"{len(plan.stages)} enlargements"
    line(
        f"{width}x{height} from a base of {plan.base[1]}x{plan.base[0]}{margin} in {stages} by {plan.executor}, "
        f"seed {plan.seed}, {plan.precision} on {plan.backend}"
    )
    _out.print(_stage_table(plan, projection, measured))
    last, budget = plan.stages[-1], measured.budget
    if last.blend:
        line(f"tiles of {last.name} are cross-faded over {last.blend * last.scale} px ({last.ramp})")
    if max(projection.batches, default=1) > 1:
        line(f"batches of {', '.join(map(str, projection.batches))} tiles")
    if measured.precision_error is not None:
        line(precision_text(measured.precision_error))
    line(f"shards {plan.shard} px, chunks {plan.chunk} px, {len(plan.pyramid)} pyramid levels")
    parts = ", ".join(f"{name} {readable(size)}" for name, size in projection.host_parts.items())
    line(
        f"memory {readable(projection.host)} of {readable(budget.host)} (idle {readable(projection.baseline)}; {parts})"
    )
    if budget.device is not None:
        line(f"device memory {readable(projection.device)} of {readable(budget.device)}")
    line(
        f"disk at most {readable(projection.disk)}, scratch at most {readable(projection.scratch)}, "
        f"of {readable(budget.disk)} free"
    )
    line(f"time about {clock(projection.seconds)}")


def _stage_table(plan: Plan, projection: Projection, measured: Measured) -> Table:
    shape, count = ("band", "strips") if plan.is_banded else ("tile", "tiles")
    columns = ("step", "input", shape, "core", "halo", "seam error", count, "recompute")
    table = Table(*columns, box=None, pad_edge=False)
    inputs = plan.input_columns(next(plan.column_strips())) if plan.is_banded else ()
    errors = seam_errors(plan, measured)
    rows = zip(plan.stages, errors, projection.tasks, projection.lr_pixels, strict=True)
    for index, (stage, error, tasks, pixels) in enumerate(rows):
        seam = "exact" if error == 0 else "not measured" if error is None else f"{error:.2f} levels"
        height, width = (stage.band, inputs[index][1] - inputs[index][0]) if plan.is_banded else stage.tile_shape
        table.add_row(
            str(stage.step), f"{stage.width}x{stage.height}", f"{width}x{height}", str(stage.tile), str(stage.halo),
            seam, str(tasks), f"{pixels / (stage.height * stage.width):.2f}x",
        )  # fmt: skip
    return table


def model_json(model: Model) -> dict[str, Any]:
    """A model file, for machines."""
    manifest: dict[str, Any] = json.loads(model.manifest.to_json())
    for stage in manifest["stages"]:
        stage["parameters"] = model.parameters(stage["weights"])
    if manifest["structure"]:
        manifest["structure"]["parameters"] = model.parameters("structure")
    return {"path": str(model.path), "bytes": model.path.stat().st_size, **manifest}


def print_model(model: Model) -> None:
    """A model file, for people."""
    line(f"{model.path}: {model.path.stat().st_size / 1e6:.1f} MB, digest {model.digest[:16]}")
    if (generator := model.base_generator) is not None:
        height, width = generator.base_size
        line(
            f"step 1: {(model.manifest.structure or {})['architecture']}, {len(generator.sizes)} scales up to {width}x{height}, "
            f"{model.parameters('structure'):,} parameters, margin {model.manifest.margin} px"
        )
    table = Table(
        *("step", "architecture", "parameters", "weights", "noise", "+ channels", "auto halo"),
        box=None,
        pad_edge=False,
    )
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
        table.add_row(
            str(step_of(index)), f"{stage.architecture} x{stage.scale}", f"{model.parameters(stage.weights):,}",
            stage.weights, f"{stage.sigma:g}", channels + gain, halo,
        )  # fmt: skip
    _out.print(table)
    for licence in model.manifest.licences:
        line(f"licence: {licence}")


def profiles_json(model: Model, profiles: list[StageProfile]) -> list[dict[str, Any]]:
    """Profiles of all stages, for machines."""
    return [
        {"stage": i + 1, "radius": model.network(i).radius, "align": model.network(i).align, **p.to_json()}
        for i, p in enumerate(profiles)
    ]


def print_profiles(model: Model, profiles: list[StageProfile]) -> None:
    """Profiles of all stages, for people."""
    for index, profile in enumerate(profiles):
        network = model.network(index)
        line(f"step {step_of(index)}: {model.stages[index].architecture}, measured on {profile.content}")
        line(
            f"  theoretical receptive field: {network.radius} px one-sided; tile origins on a grid of {network.align} px"
        )
        for name, radii in (("|g|", profile.erf_abs), ("g^2", profile.erf_square)):
            text = ", ".join(f"{float(f):.1%} {r} px" for f, r in radii.items()) or "larger than the crop"
            line(f"  effective receptive field by {name}: {text}")
        table = Table("halo", "mean", "99.9 %", "max", box=None, pad_edge=False)
        for point in _thinned(profile):
            table.add_row(str(point.halo), *(f"{v:.2f}" for v in (point.mean, point.p999, point.max)))
        line("  seam error in levels of 255:")
        _out.print(table)
        chosen = profile.halo_within(SEAM_TOLERANCE)
        line(
            f"  overlap auto: {'exact' if chosen is None else f'{chosen.halo} px, largest error {chosen.max:.2f} levels'}"
        )


def _thinned(profile: StageProfile) -> list[SeamPoint]:
    """Every fourth point, the last point, and the automatic choice."""
    chosen = profile.halo_within(SEAM_TOLERANCE)
    last = len(profile.seam) - 1
    return [p for i, p in enumerate(profile.seam) if i % 4 == 0 or i == last or p == chosen]


def check_place(name: str, path: Path) -> None:
    """Refuse a file that could not be written at the end. ``name``: the option. Raises UsageError."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{option(name, path)}: cannot be written; name a file in a folder that exists")


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
    figure.savefig(path, dpi=110)


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
