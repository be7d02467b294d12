"""What people read: a plan, a model, a measurement and a finished render as tables on stdout; the same as JSON."""

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
from engine.errors import UsageError
from engine.model.bundle import Model
from engine.plan.cost import Budget, Projection, readable
from engine.plan.halo import HaloPolicy
from engine.plan.measured import PrecisionError, StageProfile
from engine.plan.plan import BANDS, Plan
from engine.version import __version__

_PLOT_SUFFIXES = (".png", ".svg")

_out = Console(highlight=False, soft_wrap=True)


def print_json(data: object) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def line(text: str) -> None:
    """One line on stdout."""
    sys.stdout.write(text + "\n")


def plan_json(plan: Plan, projection: Projection, budget: Budget, precision: PrecisionError | None) -> dict[str, Any]:
    return {
        "plan": plan.to_json(),
        "digest": plan.digest,
        "seam_error_levels": plan.seam_error,
        "precision_error_levels": asdict(precision) if precision else None,
        "projection": projection.to_json(),
        "budget": {"host": budget.host, "device": budget.device, "disk": budget.disk},
    }


def precision_text(error: PrecisionError) -> str:
    return (
        f"error against fp32 {error.mean:.2f} levels on average, {error.p999:.2f} for 99.9 %, {error.max:.2f} at most, "
        "measured on a sample"
    )


def print_plan(plan: Plan, projection: Projection, budget: Budget, precision: PrecisionError | None) -> None:
    height, width = plan.size
    last = plan.stages[-1]
    margin = f" (margin {plan.margin})" if plan.margin else ""
    base = f"{plan.base[1]}x{plan.base[0]}{margin}"
    stages = "1 stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages"
    line(
        f"{width}x{height} from a base of {base} in {stages} by {plan.executor}, seed {plan.seed}, "
        f"{plan.precision} on {plan.backend}"
    )
    cut = ("band", "strips") if plan.executor == BANDS else ("tile", "tiles")
    table = Table("stage", "input", cut[0], "core", "halo", "seam error", cut[1], "recompute", box=None, pad_edge=False)
    read = plan.reads(next(plan.strips())) if plan.executor == BANDS else ()
    for index, (stage, count, pixels) in enumerate(zip(plan.stages, projection.pieces, projection.pixels, strict=True)):
        error = (
            "exact"
            if stage.seam_error == 0
            else "not measured"
            if stage.seam_error is None
            else f"{stage.seam_error:.2f} levels"
        )
        height, width = (stage.band, read[index][1] - read[index][0]) if read else stage.tile_shape
        shape = f"{width}x{height}"
        table.add_row(
            stage.name, f"{stage.width}x{stage.height}", shape, str(stage.core), str(stage.halo),
            error, str(count), f"{pixels / (stage.height * stage.width):.2f}x",
        )  # fmt: skip
    _out.print(table)
    if last.blend:
        line(f"tiles of {last.name} fade into each other over {last.blend * last.scale} px ({last.ramp})")
    if max(projection.batches, default=1) > 1:
        line(f"batches of {', '.join(map(str, projection.batches))} tiles")
    if precision is not None:
        line(precision_text(precision))
    line(f"shards {plan.shard} px, chunks {plan.chunk} px, {len(plan.levels)} pyramid levels")
    parts = ", ".join(f"{name} {readable(size)}" for name, size in projection.host_parts.items())
    line(
        f"memory {readable(projection.host)} of {readable(budget.host)} (idle {readable(projection.baseline)}; {parts})"
    )
    if budget.device is not None:
        line(f"device memory {readable(projection.device)} of {readable(budget.device)}")
    line(
        f"disk at most {readable(projection.disk)}, scratch at most {readable(projection.scratch)}, of {readable(budget.disk)} free"
    )
    line(f"time about {clock(projection.seconds)}")


def model_json(model: Model) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(model.manifest.to_json())
    for stage in manifest["stages"]:
        stage["parameters"] = model.parameters(stage["weights"])
    if manifest["structure"]:
        manifest["structure"]["parameters"] = model.parameters("structure")
    return {"path": str(model.path), "bytes": model.path.stat().st_size, **manifest}


def print_model(model: Model) -> None:
    line(f"{model.path}: {model.path.stat().st_size / 1e6:.1f} MB, digest {model.digest[:16]}")
    if model.structure is not None:
        height, width = model.structure.base_size
        facts = model.manifest.structure or {}
        line(
            f"step 1: {facts['architecture']}, {len(model.structure.sizes)} scales up to {width}x{height}, "
            f"{model.parameters('structure'):,} parameters, margin {model.manifest.margin} px"
        )
    table = Table(
        *("stage", "architecture", "parameters", "weights", "noise", "+ channels", "auto halo"),
        box=None,
        pad_edge=False,
    )
    for index, stage in enumerate(model.stages):
        point = stage.profile.halo_within(HaloPolicy().tolerance) if stage.profile else None
        halo = (
            "not measured"
            if stage.profile is None
            else "exact"
            if point is None
            else f"{point.halo} ({point.max:.2f} levels)"
        )
        channels = str(model.network(index).noise_channels)
        louder = f" x {stage.noise_gain:g}" if stage.noise_gain != 1 else ""
        table.add_row(
            str(index + 1), f"{stage.architecture} x{stage.scale}", f"{model.parameters(stage.weights):,}", stage.weights,
            f"{stage.sigma:g}", channels + louder, halo,
        )  # fmt: skip
    _out.print(table)
    for licence in model.manifest.licences:
        line(f"licence: {licence}")


def profiles_json(model: Model, profiles: list[StageProfile]) -> list[dict[str, Any]]:
    return [
        {"stage": i + 1, "radius": model.network(i).radius, "align": model.network(i).align, **p.to_json()}
        for i, p in enumerate(profiles)
    ]


def print_profiles(model: Model, profiles: list[StageProfile]) -> None:
    for index, profile in enumerate(profiles):
        network = model.network(index)
        line(f"stage {index + 1}: {model.stages[index].architecture}, measured on {profile.content}")
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
        chosen = profile.halo_within(HaloPolicy().tolerance)
        line(
            f"  overlap auto: {'exact' if chosen is None else f'{chosen.halo} px, largest error {chosen.max:.2f} levels'}"
        )


def _thinned(profile: StageProfile) -> list[Any]:
    """Every fourth point, the last one, and the one that auto takes."""
    chosen = profile.halo_within(HaloPolicy().tolerance)
    last = len(profile.seam) - 1
    return [p for i, p in enumerate(profile.seam) if i % 4 == 0 or i == last or p == chosen]


def check_place(flag: str, path: Path) -> None:
    """Refuse before the work what could not be written after it."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{flag} {path}: cannot be written there; name a file in a folder that exists")


def check_plot(path: Path) -> None:
    """Refuse before the measurement what could not be drawn after it."""
    check_place("--plot", path)
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise UsageError(f"--plot {path}: name a file that ends in {' or '.join(_PLOT_SUFFIXES)}")
    if util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; pip install 'ourgan-engine[plot]'")


def plot_profiles(profiles: list[StageProfile], path: Path) -> None:
    """Seam error against the halo, one colour a stage, with the ERF radii as vertical lines."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, profile in enumerate(profiles):
        colour = colormaps["tab10"](index)
        halos = [p.halo for p in profile.seam]
        for name, style in (("max", "-"), ("p999", "--"), ("mean", ":")):
            values = [max(getattr(p, name), 1e-3) for p in profile.seam]
            axes.plot(halos, values, style, color=colour, label=f"stage {index + 1}, {name}")
        for radii, style in ((profile.erf_abs, "-"), (profile.erf_square, ":")):
            if "0.98" in radii:
                axes.axvline(radii["0.98"], color=colour, linestyle=style, linewidth=0.8)
    axes.axhline(HaloPolicy().tolerance, color="black", linewidth=0.8, label="default tolerance")
    axes.set(xlabel="halo (low-resolution pixels); vertical: 98 % ERF by |g| (solid) and g^2 (dotted)",
             ylabel="seam error (levels of 255)", yscale="log")  # fmt: skip
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def run_report(
    plan: Plan, projection: Projection, budget: Budget, precision: PrecisionError | None, measured: dict[str, Any]
) -> dict[str, Any]:
    """The machine-readable account of a run."""
    machine = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
    }
    return {
        "engine": __version__,
        **plan_json(plan, projection, budget, precision),
        "measured": measured,
        "machine": machine,
    }
