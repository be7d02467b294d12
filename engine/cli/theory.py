"""engine plan --theory: the paper's account of memory for these networks, beside its numbers and a measured peak."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.archs import Upscaler
from engine.archs.hpvaegan import BaseGenerator, Config, scale_sizes
from engine.archs.swinir import SwinIR
from engine.cli import report
from engine.cli.tables import print_table
from engine.errors import InputError
from engine.model.bundle import Model, load
from engine.plan.plan import StagePlan
from engine.probe.theory import (
    GB,
    PAPER_MEASURED,
    PAPER_PRINTED,
    PAPER_SUBREGION,
    Account,
    Network,
    largest_layer,
    largest_structure_layer,
    parameters,
)

_PAPER_SIZE = (2160, 4096)
_PAPER_STAGES = 3  # of OUR-GAN-16K; OUR-GAN, whose memory Table 2 has, is without the last


@dataclass(frozen=True, slots=True)
class Chain:
    """The networks of a model. ``stages`` that share weights share an entry of ``shared``, their names."""

    title: str
    structure: Network | None
    stages: tuple[Network, ...]
    shared: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Of all networks, shared ones once."""
        distinct = {name: network.parameters for name, network in zip(self.shared, self.stages, strict=True)}
        return sum(distinct.values()) + (self.structure.parameters if self.structure else 0)

    def first(self, count: int) -> Chain:
        return Chain(self.title, self.structure, self.stages[:count], self.shared[:count])

    def account(self, name: str, pixels: Sequence[int]) -> Account:
        return Account.of(name, self.stages, pixels, self.parameters)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run report says. ``pixels``: of the tile or band that each stage takes in at a time; peaks in bytes."""

    pixels: tuple[int, ...]
    executor: str
    precision: str
    working_peak: int
    device_peak: int


def theory(model_path: Path | None, report_path: Path | None, as_json: bool) -> None:
    """Of a model, or of the paper's configuration."""
    model = load(model_path) if model_path is not None else None
    chain = _chain(model) if model is not None else _paper_chain()
    run = _read_run(report_path, model) if report_path is not None and model is not None else None
    counted = chain if model is not None else chain.first(_PAPER_STAGES - 1)
    accounts = [
        counted.account("the paper's subregion, exactly", [PAPER_SUBREGION.pixels] * len(counted.stages)),
        counted.account("as the paper evaluates it", [PAPER_SUBREGION.pixels_as_evaluated] * len(counted.stages)),
    ]
    if run is not None:
        piece = "a band of this run" if run.executor == "bands" else "a tile of this run"
        accounts.append(chain.first(len(run.pixels)).account(piece, run.pixels))
    if as_json:
        report.print_json(_json(chain, accounts, run))
    else:
        _print(chain, accounts, run)


def _paper_chain() -> Chain:
    """HP-VAE-GAN with vertical coordinates and a SwinIR-M for each further step."""
    with torch.device("meta"):
        structure, network = BaseGenerator(Config(), scale_sizes(_PAPER_SIZE)), SwinIR()
    stages = [_stage(step, "swinir", network) for step in range(2, 2 + _PAPER_STAGES)]
    names = tuple(f"step {stage.step}" for stage in stages)
    return Chain("the paper's configuration", _first_step(structure), tuple(stages), names)


def _chain(model: Model) -> Chain:
    first = _first_step(model.base_generator) if model.base_generator is not None else None
    stages = [_stage(i + 2, s.architecture, model.network(i)) for i, s in enumerate(model.stages)]
    return Chain(model.path.name, first, tuple(stages), tuple(s.weights for s in model.stages))


def _first_step(structure: BaseGenerator) -> Network:
    return Network(1, "hpvaegan", parameters(structure), largest_structure_layer(structure))


def _stage(step: int, architecture: str, network: Upscaler) -> Network:
    return Network(step, architecture, parameters(network), largest_layer(network))


def _read_run(path: Path, model: Model) -> Run:
    """Raises InputError unless it is the report of a run of this model."""
    try:
        found = json.loads(path.read_text())
        plan, measured = found["plan"], found["measured"]
        stages = [StagePlan.from_json(stage) for stage in plan["stages"]]
        pieces = [(stage.band or stage.tile_shape[0]) * stage.tile_shape[1] for stage in stages]
        run = Run(
            tuple(pieces), str(plan["executor"]), str(plan["precision"]),
            int(measured["working_peak"]), int(measured["device_peak"]),
        )  # fmt: skip
        digest = str(plan["model_digest"])
    except OSError as error:
        raise InputError(
            f"--report {path}: cannot be read ({error.strerror}); engine render --report writes it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--report {path}: not a run report ({error!r}); engine render --report writes it") from error
    if digest != model.digest:
        raise InputError(
            f"--report {path}: of the model {digest[:12]}, but {model.path} is {model.digest[:12]}; name the model of the run"
        )
    return run


def _json(chain: Chain, accounts: Sequence[Account], run: Run | None) -> dict[str, Any]:
    return {
        "model": chain.title,
        "structure": asdict(chain.structure) if chain.structure else None,
        "stages": [asdict(stage) for stage in chain.stages],
        "parameters": chain.parameters,
        "accounts": [asdict(account) for account in accounts],
        "paper": {"theoretical_gb": PAPER_PRINTED, "measured_gb": PAPER_MEASURED},
        "run": asdict(run) if run else None,
    }


def _print(chain: Chain, accounts: Sequence[Account], run: Run | None) -> None:
    report.line(f"{chain.title}: parameters, and the layer with the most features in its input and output together")
    print_table(("step", "architecture", "parameters", "largest layer", "features per input pixel"), _networks(chain))
    sums = "; ".join(f"{total:,}" for total in _sums(chain))
    report.line(f"parameters of the first stage, the first two, ...: {sums}; of all with step 1: {chain.parameters:,}")
    report.line(
        "synthesis memory in GB (10^9 bytes), fp32: parameters + input and output features of the largest layer"
    )
    head = ("account", "input pixels", "features", "+ network at work", "+ all networks")
    rows = [
        (a.name, f"{a.pixels:,}", *(f"{n / GB:.3f}" for n in (a.features, a.at_work, a.everything))) for a in accounts
    ]
    print_table(head, [("Table 2 of the paper, as printed", "", "", f"{PAPER_PRINTED}", ""), *rows])
    report.line(f"measured by the paper, on a GPU: {PAPER_MEASURED} GB")
    if run is not None:
        peaks = f"{run.working_peak / GB:.3f} GB on the host above the idle process, {run.device_peak / GB:.3f} GB on the device"
        report.line(f"measured in this run, by {run.executor} in {run.precision}: {peaks}")


def _networks(chain: Chain) -> Iterator[tuple[str, ...]]:
    for network in (chain.structure, *chain.stages):
        if network is not None:
            per_pixel = network.layer.floats / network.layer.pixels
            yield (
                str(network.step), network.architecture, f"{network.parameters:,}", network.layer.name, f"{per_pixel:,.0f}",
            )  # fmt: skip


def _sums(chain: Chain) -> Iterator[int]:
    """Parameters of the first stages together: the paper has 23.4 M for two and 35.1 M for three, without step 1."""
    for count in range(1, len(chain.stages) + 1):
        yield Chain(chain.title, None, chain.stages[:count], chain.shared[:count]).parameters
