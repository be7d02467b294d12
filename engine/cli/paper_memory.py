"""``engine plan --theory``: the paper's account of memory for a model, next to the paper's numbers and a measured peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.archs import Upscaler
from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.archs.swinir import SwinIR
from engine.cli import report
from engine.cli.tables import print_table
from engine.errors import InputError, option
from engine.model.bundle import Model, load
from engine.plan.stage import StagePlan
from engine.probe.paper_memory import (
    GB,
    PAPER_MEASURED_GB,
    PAPER_SUBREGION,
    PAPER_THEORETICAL_GB,
    MemoryAccount,
    NetworkSize,
    account_for,
    largest_base_layer,
    largest_layer,
    parameter_count,
)

_PAPER_SIZE = (2160, 4096)
_PAPER_STAGES = 3
"""Super-resolution steps of OUR-GAN-16K. OUR-GAN, the one in Table 2, lacks the last."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model's networks."""

    title: str
    """Name of the model."""
    base: NetworkSize | None
    """Network of step 1, if the model has one."""
    stages: tuple[NetworkSize, ...]
    """Networks of the super-resolution steps."""
    weights: tuple[str, ...]
    """Name of each stage's weights; stages that share weights have the same one."""

    @property
    def parameters(self) -> int:
        """Parameters of all networks; shared ones count once."""
        distinct = {name: network.parameters for name, network in zip(self.weights, self.stages, strict=True)}
        return sum(distinct.values()) + (self.base.parameters if self.base else 0)

    def first(self, count: int) -> ModelSize:
        """The model with its first ``count`` stages only."""
        return ModelSize(self.title, self.base, self.stages[:count], self.weights[:count])

    def account(self, name: str, pixels: Sequence[int]) -> MemoryAccount:
        """Account for inputs of ``pixels`` low-resolution pixels, one number per stage."""
        return account_for(name, self.stages, pixels, self.parameters)


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """Plan and peaks of a run, from its report."""

    pixels: tuple[int, ...]
    """Low-resolution pixels of the tile or band that each stage processes at a time."""
    executor: str
    """Executor of the run."""
    in_bands: bool
    """Whether the stages ran in bands."""
    precision: str
    """Precision of the stages."""
    working_peak: int
    """Peak of host memory above the idle process, in bytes."""
    device_peak: int
    """Peak of device memory, in bytes."""


def print_account(model_path: Path | None, report_path: Path | None, *, as_json: bool) -> None:
    """Print the account of a model; without one, of the paper's configuration.

    Args:
        model_path: file of the model.
        report_path: report of a run of this model, whose peak is printed next to the account.
        as_json: print JSON instead of tables.

    Raises:
        InputError: a file cannot be read, or the report belongs to another model.
    """
    model = load(model_path) if model_path is not None else None
    sizes = _model_size(model) if model is not None else _paper_size()
    run = _read_run(report_path, model) if report_path is not None and model is not None else None
    counted = sizes if model is not None else sizes.first(_PAPER_STAGES - 1)
    accounts = [
        counted.account("the paper's subregion, exactly", [PAPER_SUBREGION.pixels] * len(counted.stages)),
        counted.account("as the paper evaluates it", [PAPER_SUBREGION.pixels_as_evaluated] * len(counted.stages)),
    ]
    if run is not None:
        name = "a band of this run" if run.in_bands else "a tile of this run"
        accounts.append(sizes.first(len(run.pixels)).account(name, run.pixels))
    if as_json:
        report.print_json(_json(sizes, accounts, run))
    else:
        _print_tables(sizes, accounts, run)


def _paper_size() -> ModelSize:
    """HP-VAE-GAN with vertical coordinates, and one SwinIR-M per further step."""
    with torch.device("meta"):
        base, network = BaseGenerator(Config(), scale_sizes(_PAPER_SIZE)), SwinIR()
    stages = tuple(_stage_size(step, "swinir", network) for step in range(2, 2 + _PAPER_STAGES))
    return ModelSize(
        "the paper's configuration", _base_size(base), stages, tuple(f"step {stage.step}" for stage in stages)
    )


def _model_size(model: Model) -> ModelSize:
    base = _base_size(model.base_generator) if model.base_generator is not None else None
    stages = tuple(_stage_size(i + 2, s.architecture, model.network(i)) for i, s in enumerate(model.stages))
    return ModelSize(model.path.name, base, stages, tuple(s.weights for s in model.stages))


def _base_size(base: BaseGenerator) -> NetworkSize:
    return NetworkSize(1, "hpvaegan", parameter_count(base), largest_base_layer(base))


def _stage_size(step: int, architecture: str, network: Upscaler) -> NetworkSize:
    return NetworkSize(step, architecture, parameter_count(network), largest_layer(network))


@dataclass(frozen=True, slots=True)
class _ReportedPlan:
    """Keys of a run report's ``plan`` that the account needs."""

    stages: list[dict[str, Any]]
    executor: str
    precision: str
    model_digest: str


@dataclass(frozen=True, slots=True)
class _ReportedPeaks:
    """Keys of a run report's ``measured`` that the account needs."""

    working_peak: int
    device_peak: int


@dataclass(frozen=True, slots=True)
class _RunReport:
    plan: _ReportedPlan
    measured: _ReportedPeaks


def _read_run(path: Path, model: Model) -> MeasuredRun:
    """Read the report of a run of ``model``; raises InputError for any other file."""
    advice = "engine render --report writes one"
    try:
        run = msgspec.json.decode(path.read_bytes(), type=_RunReport)
        stages = [StagePlan.from_json(stage) for stage in run.plan.stages]
    except OSError as error:
        raise InputError(f"{option('report', path)}: cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{option('report', path)}: not a run report ({error}); {advice}") from error
    plan, peaks = run.plan, run.measured
    if plan.model_digest != model.digest:
        raise InputError(
            f"{option('report', path)}: of another model ({plan.model_digest[:12]}, {model.path} is {model.digest[:12]}); "
            "name the model of the run"
        )
    pixels = tuple((stage.band or stage.tile_shape[0]) * stage.tile_shape[1] for stage in stages)
    return MeasuredRun(
        pixels, plan.executor, stages[-1].band > 0, plan.precision, peaks.working_peak, peaks.device_peak
    )


def _json(sizes: ModelSize, accounts: Sequence[MemoryAccount], run: MeasuredRun | None) -> dict[str, Any]:
    return {
        "model": sizes.title,
        "structure": asdict(sizes.base) if sizes.base else None,
        "stages": [asdict(stage) for stage in sizes.stages],
        "parameters": sizes.parameters,
        "accounts": [asdict(account) for account in accounts],
        "paper": {"theoretical_gb": PAPER_THEORETICAL_GB, "measured_gb": PAPER_MEASURED_GB},
        "run": asdict(run) if run else None,
    }


def _print_tables(sizes: ModelSize, accounts: Sequence[MemoryAccount], run: MeasuredRun | None) -> None:
    report.line(f"{sizes.title}: parameters, and the layer with the most features in input and output together")
    print_table(("step", "architecture", "parameters", "largest layer", "features per input pixel"), _networks(sizes))
    totals = "; ".join(f"{total:,}" for total in _running_totals(sizes))
    report.line(f"parameters from step 2 up to each step: {totals}; of all steps: {sizes.parameters:,}")
    report.line("synthesis memory in GB (10^9 bytes), fp32: parameters + features of the largest layer")
    head = ("account", "input pixels", "features", "+ largest network", "+ all networks")
    rows = [
        (a.name, f"{a.pixels:,}", *(f"{n / GB:.3f}" for n in (a.features, a.at_work, a.everything))) for a in accounts
    ]
    print_table(head, [("Table 2 of the paper, as printed", "", "", f"{PAPER_THEORETICAL_GB}", ""), *rows])
    report.line(f"measured by the paper, on a GPU: {PAPER_MEASURED_GB} GB")
    if run is not None:
        host = f"{run.working_peak / GB:.3f} GB on the host above the idle process"
        device = f"{run.device_peak / GB:.3f} GB on the device"
        report.line(f"measured in this run, by {run.executor} in {run.precision}: {host}, {device}")


def _networks(sizes: ModelSize) -> Iterator[tuple[str, ...]]:
    for network in (sizes.base, *sizes.stages):
        if network is not None:
            per_pixel = f"{network.layer.floats / network.layer.pixels:,.0f}"
            parameters = f"{network.parameters:,}"
            yield str(network.step), network.architecture, parameters, network.layer.name, per_pixel


def _running_totals(sizes: ModelSize) -> Iterator[int]:
    """Parameters of the first 1, 2, ... stages; the paper states 23.4 M for two and 35.1 M for three."""
    for count in range(1, len(sizes.stages) + 1):
        yield ModelSize(sizes.title, None, sizes.stages[:count], sizes.weights[:count]).parameters
