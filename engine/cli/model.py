"""The commands ``engine model build`` and ``engine probe``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.cli import report
from engine.cli.outputs import check_inputs_stay, check_new
from engine.cli.progress import log
from engine.device.choose import choose_device
from engine.device.memory import free_device
from engine.device.queue import full_float32, memory_errors
from engine.errors import UsageError, option
from engine.io.objects import check_local
from engine.model.build import build as build_model
from engine.model.bundle import load
from engine.probe.profiles import measure_profiles, remember


def build(
    out: Path,
    structure: Path | None,
    sr: Sequence[str],
    sigmas: Sequence[float],
    licence: str | None,
    margin: int | None,
    noise_gains: Sequence[float],
    *,
    overwrite: bool,
) -> None:
    """Write a model file and print it."""
    if out.suffix != ".safetensors":
        raise UsageError(f"{option('out', out)}: a model file ends in .safetensors; choose another name")
    check_inputs_stay("out", out, [structure, *sr])
    check_new(out, overwrite=overwrite)
    report.print_model(build_model(structure, sr, sigmas, licence, margin, noise_gains).save(out))


def probe(path: Path, image: Path | None, save: bool, plot: Path | None, device: str | None, as_json: bool) -> None:
    """Measure a model's stages, print the profiles, and store them in the model file or in the cache."""
    if save:
        check_local("save", path)
    model = load(path)
    if save and model.path.suffix != ".safetensors":
        raise UsageError(
            f"{option('save', True)}: {path} is a checkpoint, not a model file; make one with engine model build"
        )
    if plot is not None:
        report.check_plot(plot)
        check_inputs_stay("plot", plot, [path, image])
    chosen = choose_device(device)
    with memory_errors(), full_float32():
        profiles = measure_profiles(model, image, chosen, log, limit=free_device(chosen))
    if plot is not None:
        report.plot_profiles(profiles, plot)
    if save:
        model.with_profiles(profiles).save(path)
    else:
        remember(model, profiles)
    if as_json:
        report.print_json(report.profiles_json(model, profiles))
    else:
        report.print_profiles(model, profiles)
