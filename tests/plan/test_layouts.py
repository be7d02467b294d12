"""Executors: the table, and its use as the only place that knows their names."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import cost_of, measured_of, stage_of

from engine.errors import UsageError
from engine.plan.layouts import EXECUTORS, candidates, rounded
from engine.plan.measured import BandCost
from engine.plan.plan import RENAMED_EXECUTORS, Plan, executor_of
from engine.plan.request import Request

ROOT = Path(__file__).parents[2]
SOURCES = ("engine", "kernels", "exporters", "models")

NAMES = {*EXECUTORS, *RENAMED_EXECUTORS}


def test_modules_have_a_run_function():
    for name, executor in EXECUTORS.items():
        run = import_module(f"engine.run.{executor.module}").run
        assert list(inspect.signature(run).parameters) == ["pipeline", "sink"], name


def test_requests_accept_every_executor():
    for name in EXECUTORS:
        assert candidates(Request(executor=name, device="cpu"), "cpu") == (name,)
    for former, name in RENAMED_EXECUTORS.items():
        assert Request(executor=former).executor == executor_of({"executor": former}) == name
        assert name in EXECUTORS
    with pytest.raises(
        UsageError, match="executor='abacus': unknown executor; use auto or one of bands, batched, tiles"
    ):
        candidates(Request(executor="abacus"), "cpu")
    assert {e.on_cpu for e in EXECUTORS.values()} <= {None, *EXECUTORS}
    assert Plan.__dataclass_fields__["executor"].default in EXECUTORS


def compared(tree):
    """(line, value) of every string that a comparison or a match statement compares with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for constant in ast.walk(node):
                if isinstance(constant, ast.Constant):
                    yield node.lineno, constant.value
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
            yield node.lineno, node.value.value


@pytest.mark.parametrize("text", ['x == "bands"', 'x in ("tiles", "bands")', 'match x:\n case "bands": pass'])
def test_comparisons_are_found(text):
    assert "bands" in {value for _, value in compared(ast.parse(text))}


def test_names_are_compared_nowhere_else():
    """A new executor is one entry of the table, without conditions elsewhere."""
    paths = {path.resolve() for source in SOURCES for path in (ROOT / source).rglob("*.py")}
    assert len(paths) > 50
    places = []
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        strings = compared(ast.parse(path.read_text()))
        places += [f"{name}:{line}" for line, value in strings if value in NAMES]
    assert not places


CANDIDATES = [
    ({}, "cpu", ("bands", "tiles")),
    ({}, "cuda", ("bands", "batched")),
    ({}, "xpu", ("bands", "batched")),
    # A requested tile or cross-fade means tiles.
    ({"tile": 16}, "cpu", ("tiles",)),
    ({"blend": 8}, "cpu", ("tiles",)),
    ({"tile": 16}, "cuda", ("batched",)),
    ({"blend": 8}, "cuda", ("batched",)),
    # A CPU gains nothing from batches, but a CPU that is requested by name runs them.
    ({"executor": "batched"}, "cpu", ("tiles",)),
    ({"executor": "stream"}, "cpu", ("tiles",)),
    ({"executor": "batched", "device": "cpu"}, "cpu", ("batched",)),
    ({"executor": "batched"}, "cuda", ("batched",)),
    ({"executor": "tiles"}, "cuda", ("tiles",)),
    ({"executor": "bands"}, "cuda", ("bands",)),
    ({"executor": "bands", "tile": 16}, "cpu", ("bands",)),
]


def test_candidates():
    for options, device, names in CANDIDATES:
        assert candidates(Request(**options), device) == names, (options, device)


def test_automatic_choice_always_has_a_candidate_without_bands():
    """Networks that cannot be streamed in bands are rendered all the same."""
    measured = measured_of([cost_of()])
    for device in ("cpu", "cuda", "mps", "xpu"):
        for options in ({}, {"tile": 16}, {"blend": 8}):
            names = candidates(Request(**options), device)
            assert any(EXECUTORS[name].layout.is_possible(measured) for name in names)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 3000), st.integers(1, 16), st.integers(1, 4))
def test_rounded_tiles_are_whole_windows_and_even(tile, align, scale):
    stage = stage_of(100, 100, align, 0, align, scale)
    size = rounded(tile, stage)
    assert size % align == 0
    assert size * scale % 2 == 0
    assert tile <= size < tile + 2 * align
    assert rounded(size, stage) == size


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.sampled_from(sorted(EXECUTORS)), st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 8]))
def test_restored_cuts_are_valid(name, tile, width, align):
    """A stored tile that fits no window, for instance of another model, is rounded, so that plans can be compared."""
    layout = EXECUTORS[name].layout
    stages = [stage_of(50, 50, align, align, align, position=position) for position in (0, 1)]
    measured = measured_of([cost_of(align=align, bands=BandCost(16, 1.0, 0.0))] * 2)
    cuts = layout.restore(stages, measured, width, [(tile, tile)] * 2)
    for cut in cuts:
        cut.check()
    assert layout.restore(stages, measured, width, [cut.core for cut in cuts]) == cuts
    assert all((cut.band > 0) == layout.in_bands for cut in cuts)
    shard, chunk = layout.shard(cuts[-1], width)
    assert all(whole % part == 0 for whole, part in zip(shard, chunk, strict=True))
    assert layout.choose(stages, measured, width, (tile, tile)) == cuts
