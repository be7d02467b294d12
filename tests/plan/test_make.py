"""Plans made of requests and measurements, and cuts that are restored from stored plans."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import GIB, cost_of, measured_of

from engine.errors import BudgetError, UsageError
from engine.geometry import Box
from engine.plan.canvas import Canvas, canvas_of_scene
from engine.plan.cost import check
from engine.plan.layouts import EXECUTORS
from engine.plan.make import make_plan, project, region, seam_errors
from engine.plan.measured import BandCost, Footprint, MissingMeasurement, SeamPoint, StageProfile
from engine.plan.request import Request
from engine.plan.stored import StoredCut, stored_cut

quick = settings(deadline=None, derandomize=True, max_examples=50)

MIB = 1 << 20
BANDS = BandCost(16, 20_000.0, 1e-6)
EXPENSIVE_BANDS = BandCost(16, 10e9, 1e-6)
PROFILE = StageProfile("", {}, {}, (SeamPoint(0, 1.0, 2.0, 9.0), SeamPoint(4, 0.1, 0.2, 0.7)))
COST = cost_of(3 * MIB, 700.0, 1e-6, bands=BANDS, radius=12, profile=PROFILE)
LARGE_BANDS = replace(COST, bands=BandCost(16, 60_000.0, 1e-6))
UNSTREAMABLE = replace(COST, bands=None)


def measured(*costs, device="cpu", **changes):
    """Measurements of two stages of scale 4, or of these, for an image of 700 x 1000."""
    costs = costs or (COST, COST)
    if device != "cpu":
        costs = [replace(cost, on_device=True) for cost in costs]
    changes = {"base": Footprint(5 * MIB, 400.0, 1e-6), "device": 64 * GIB if device != "cpu" else None} | changes
    budgets = {key: changes.pop(key) for key in ("host", "device", "disk") if key in changes}
    return replace(measured_of(costs, **budgets), device=device, **changes)


def stored(plan, **changes):
    """The plan as a store keeps it."""
    return json.loads(json.dumps(plan.to_json() | changes))


def test_the_projection_holds_what_measuring_took():
    plan = make_plan(Request(), measured())
    usual = project(plan, measured())
    assert project(plan, measured(measuring=usual.host - 1)).host == usual.host
    larger = project(plan, measured(measuring=usual.host + 1))
    assert larger.host == usual.host + 1
    check(plan, larger, measured(host=usual.host).budget)  # measuring is over, so a smaller tile would not help


# The executor


CHOICES = [
    ({}, measured(), "bands"),
    ({}, measured(UNSTREAMABLE, UNSTREAMABLE), "tiles"),
    ({}, measured(COST, UNSTREAMABLE), "tiles"),
    ({}, measured(device="cuda"), "bands"),
    ({}, measured(UNSTREAMABLE, UNSTREAMABLE, device="cuda"), "batched"),
    ({"tile": 16}, measured(device="cuda"), "batched"),
    # 19 MB of rows, beside the context and the weights.
    ({}, measured(LARGE_BANDS, LARGE_BANDS, device="cuda", device_baseline=64 * GIB - 40 * MIB), "bands"),
    ({}, measured(LARGE_BANDS, LARGE_BANDS, device="cuda", device_baseline=64 * GIB - 16 * MIB), "batched"),
    ({"tile": 16}, measured(), "tiles"),
    ({"blend": 8}, measured(), "tiles"),
    ({"executor": "tiles"}, measured(), "tiles"),
    ({"executor": "bands", "tile": 16}, measured(), "bands"),
    ({"executor": "bands"}, measured(device="cuda"), "bands"),
    ({"executor": "batched"}, measured(), "tiles"),
    ({"executor": "stream", "device": "cpu"}, measured(), "batched"),
    # Bands that do not fit give way to tiles.
    ({}, measured(replace(COST, bands=EXPENSIVE_BANDS), COST), "tiles"),
]


def test_executor_choice():
    for number, (options, measurements, name) in enumerate(CHOICES):
        plan = make_plan(Request(**options), measurements)
        assert plan.executor == name, number
        assert plan.is_banded == EXECUTORS[name].layout.in_bands
        check(plan, project(plan, measurements), measurements.budget)


def test_bands_by_name_do_not_give_way():
    for measurements, kind, words in (
        (measured(replace(COST, bands=EXPENSIVE_BANDS), COST), BudgetError, "memory: the narrowest strip of bands"),
        (
            measured(COST, UNSTREAMABLE),
            UsageError,
            "executor='bands': cannot run the networks of this model; use executor='tiles'",
        ),
    ):
        with pytest.raises(kind, match=words):
            make_plan(Request(executor="bands"), measurements)


def test_bands_cannot_cross_fade():
    words = r"^--blend 8: bands have no tiles to [\w-]+; use --executor tiles, or leave out --blend$"
    with pytest.raises(UsageError) as caught:
        make_plan(Request(blend=8, executor="bands"), measured())
    assert re.match(words, caught.value.for_command_line())


def test_refusal_is_that_of_the_last_candidate():
    with pytest.raises(BudgetError, match=r"memory: the smallest tile of step \d|memory: step 1 for"):
        make_plan(Request(), measured(host=8 * MIB))


# The plan


def test_plan_holds_request_and_measurements():
    request = Request(seed=7, tile=16, blend=3, ramp="linear", dither=True, overlap="exact", roi=Box(10, 20, 300, 400))
    first, last = replace(COST, sigma=0.25), replace(COST, align=8, radius=9)
    plan = make_plan(
        request,
        measured(
            first, last, precisions=("fp32", "bf16"), backend="cpu, torch 2", model_digest="0a", picture_digest="0b"
        ),
    )
    assert (plan.canvas, plan.base, plan.roi) == ((700, 1000), (44, 63), request.roi)
    assert (plan.seed, plan.model_digest, plan.init_digest, plan.backend) == (7, "0a", "0b", "cpu, torch 2")
    assert plan.precision == "fp32,bf16"
    first, last = plan.stages
    assert (first.step, first.height, first.width, first.sigma, first.halo) == (2, 44, 63, 0.25, 12)
    assert (last.step, last.height, last.width, last.sigma, last.halo) == (3, 176, 252, 0.0, 16)
    # A cross-fade, its ramp and dither are those of the last stage; the width is rounded up to its window.
    assert (first.blend, first.ramp, first.dither, first.is_image) == (0, "cosine", False, False)
    assert (last.blend, last.ramp, last.dither, last.is_image) == (8, "linear", True, True)
    assert make_plan(request, measured()).precision == "fp32"


def test_requested_tiles_are_rounded_up():
    costs = COST, replace(COST, align=8)
    assert [s.tile for s in make_plan(Request(tile=17), measured(*costs)).stages] == [17, 24]
    odd = make_plan(Request(tile=17), measured(replace(COST, scale=3), replace(COST, scale=3)))
    assert [s.tile for s in odd.stages] == [18, 18]
    # A strip is as wide as the last stage's tile; the first stage has the matching width.
    bands = make_plan(Request(tile=17, executor="bands"), measured(*costs))
    assert [s.tile for s in bands.stages] == [6, 24]
    wide = make_plan(Request(tile=2000, executor="bands"), measured(*costs))
    assert [s.tile for s in wide.stages] == [63, 250]


def test_margins_are_enlarged_only_as_context():
    """Each inner stage cuts away what exceeds 32 pixels of its output, in whole windows; the last stage cuts the rest."""
    for margin, align, count, margins in (
        (8, 1, 2, [0, 32]),
        (16, 1, 2, [8, 32]),
        (16, 1, 3, [8, 24, 32]),
        (40, 8, 3, [32, 24, 32]),
        (12, 8, 2, [0, 48]),
        (40, 1, 1, [40]),
    ):
        canvas = canvas_of_scene((700, 1000), (44, 63), [4] * count, count).with_margin(margin)
        measurements = measured(*[replace(COST, align=align)] * count, canvas=canvas)
        assert [s.margin for s in make_plan(Request(), measurements).stages] == margins


@st.composite
def renders(draw):
    """(request, measurements) of any small render."""
    count, align = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 8]))
    costs = [
        replace(COST, align=align, radius=draw(st.integers(0, 20)), scale=draw(st.sampled_from([2, 4])))
        for _ in range(count)
    ]
    device = draw(st.sampled_from(["cpu", "cuda"]))
    size = draw(st.tuples(*[st.integers(1, 1500)] * 2))
    canvas = canvas_of_scene(size, (32, 32), [cost.scale for cost in costs], draw(st.sampled_from([None, count])))
    canvas = canvas.with_margin(draw(st.sampled_from([0, 8, 16, 40])))
    request = Request(
        size=size[::-1],
        tile=draw(st.none() | st.integers(16, 100)),
        executor=draw(st.sampled_from(["auto", *EXECUTORS])),
        overlap=draw(st.sampled_from(["auto", "exact", "8"])),
    )
    return request, measured(*costs[: canvas.stages], device=device, canvas=canvas)


@quick
@given(renders())
def test_plans_are_valid(render):
    """Windows fit, writes cover the region once, the margin is cut away, and a choice without a tile fits the budget."""
    request, measurements = render
    plan = make_plan(request, measurements)
    for cut in plan.stages:
        cut.check()
    assert plan.margin == measurements.canvas.margin
    assert plan.stages[-1].grid.bounds.contains(Box(0, 0, *plan.reduction.source))
    for source, cut in zip(plan.stages, plan.stages[1:], strict=False):
        assert (cut.height, cut.width) == source.grid.bounds.shape
    assert sum(box.area for box in plan.writes()) == plan.roi.area
    projection = project(plan, measurements)
    assert projection == project(plan, measurements, list(plan.writes()))
    if request.tile is None:
        check(plan, projection, measurements.budget)
    assert make_plan(request, measurements) == plan


@quick
@given(renders())
def test_stored_cuts_are_adopted(render):
    """Whatever the memory is on resume."""
    request, measurements = render
    plan = make_plan(request, measurements)
    cut = stored_cut(stored(plan), request, measurements)
    if request.tile is not None:
        assert cut is None
        return
    assert cut == StoredCut(plan.executor, tuple(s.core for s in plan.stages))
    tiny = replace(measurements, budget=replace(measurements.budget, host=1, device=1))
    assert make_plan(request, tiny, cut) == plan


def test_projections_follow_the_layout():
    bands, tiles = (Request(executor=name) for name in ("bands", "tiles"))
    measurements = measured()
    assert project(make_plan(bands, measurements), measurements).scratch == 0
    assert project(make_plan(tiles, measurements), measurements).scratch > 0
    assert project(make_plan(tiles, measurements), measurements).batches == ()
    on_device = measured(device="cuda")
    assert min(project(make_plan(Request(executor="batched"), on_device), on_device).batches) >= 1


def test_seam_errors_of_plans():
    measurements = measured(COST, replace(COST, profile=None), host=64 * GIB)
    halo, exact = Request(overlap="4", executor="tiles", tile=16), Request(overlap="exact", executor="tiles", tile=16)
    assert seam_errors(make_plan(halo, measurements), measurements) == (0.7, None)
    assert seam_errors(make_plan(exact, measurements), measurements) == (0.0, 0.0)
    # One tile or one strip has no inner edge.
    whole = replace(halo, tile=512)
    assert seam_errors(make_plan(whole, measurements), measurements) == (0.0, 0.0)
    strip, strips = (Request(overlap="4", executor="bands", tile=tile) for tile in (None, 64))
    assert seam_errors(make_plan(strip, measurements), measurements) == (0.0, 0.0)
    assert seam_errors(make_plan(strips, measurements), measurements) == (0.7, None)


def test_only_plans_with_inner_edges_need_profiles():
    unknown = measured(COST, replace(COST, profile=None))
    whole = make_plan(Request(), unknown)
    assert [stage.halo for stage in whole.stages] == [12, 12]
    assert seam_errors(whole, unknown) == (0.0, 0.0)
    assert not whole.needs_halos
    # A measurement changes nothing, and a store that was planned with measured halos is continued.
    assert make_plan(Request(), measured()) == whole
    measured_halos = replace(whole, stages=tuple(replace(stage, halo=4) for stage in whole.stages))
    assert whole.differences(stored(measured_halos)) == []
    # A region has exact halos, so its pixels are those of the whole image.
    part = make_plan(Request(roi=Box(0, 0, 99, 99)), unknown)
    assert part.needs_halos
    assert seam_errors(part, unknown) == (0.0, 0.0)
    for changes in ({"tile": 16}, {"executor": "bands", "tile": 16}, {"blend": 8}):
        with pytest.raises(MissingMeasurement) as caught:
            make_plan(Request(**changes), unknown)
        assert caught.value.kind == "profiles"
        assert make_plan(Request(**changes), measured()).needs_halos


def test_only_plans_of_tiles_need_their_cost():
    unknown = measured(replace(COST, tiles=None), COST)
    project(make_plan(Request(), unknown), unknown)
    with pytest.raises(MissingMeasurement) as caught:
        make_plan(Request(executor="tiles"), unknown)
    assert caught.value.kind == "tile costs"
    by_tile = make_plan(Request(tile=16), unknown)
    with pytest.raises(MissingMeasurement):
        project(by_tile, unknown)


# Regions and sizes


def test_regions_outside_the_canvas_are_refused():
    canvas = Canvas((700, 1000), (44, 63), 2)
    assert region(Request(), canvas) == Box(0, 0, 700, 1000)
    assert region(Request(roi=Box(699, 999, 700, 1000)), canvas) == Box(699, 999, 700, 1000)
    for roi in (Box(0, 0, 701, 10), Box(0, 0, 10, 1001), Box(-1, 0, 10, 10), Box(5, 5, 5, 9), Box(9, 5, 5, 9)):
        for refuse in (lambda r: region(r, canvas), lambda r: make_plan(r, measured())):
            with pytest.raises(UsageError) as caught:
                refuse(Request(roi=roi))
            assert str(caught.value) == (
                f"roi='{roi.x0},{roi.y0},{roi.width},{roi.height}': not inside the canvas of 1000x700; "
                "use X,Y,WIDTH,HEIGHT inside it"
            )


# Stored plans

MAKERS = {
    "tiles": (Request(executor="tiles"), measured()),
    "bands": (Request(), measured()),
    "batched": (Request(executor="batched"), measured(device="cuda")),
}


def test_old_stored_plans_are_adopted():
    """Plans with seam errors, a halo policy and former names of executors."""
    for name, (request, measurements) in MAKERS.items():
        plan = make_plan(request, measurements)
        assert plan.executor == name
        stages = [{**stage, "seam_error": 0.5} for stage in plan.to_json()["stages"]]
        old = stored(plan, stages=stages, overlap="auto", executor={"batched": "stream"}.get(name, name))
        cut = stored_cut(old, request, measurements)
        assert make_plan(request, measurements, cut) == plan
        assert plan.differences(old) == []


def test_stored_cuts_that_cannot_be_adopted():
    plan = make_plan(*MAKERS["bands"])
    bands, measurements = stored(plan), measured()
    assert stored_cut(bands, Request(), measurements) is not None
    # A requested tile is kept, and so is a requested executor.
    assert stored_cut(bands, Request(tile=16, executor="bands"), measurements) is None
    assert stored_cut(bands, Request(executor="tiles"), measurements) is None
    assert stored_cut(bands, Request(), measured(COST, UNSTREAMABLE)) is None
    assert stored_cut(bands, Request(), measured(COST)) is None
    # A render that fell back to tiles is continued in tiles.
    tiles = stored(make_plan(*MAKERS["tiles"]))
    assert stored_cut(tiles, Request(), measurements).executor == "tiles"


def test_damaged_stored_plans_are_not_adopted():
    request, measurements = MAKERS["tiles"]
    plan = make_plan(request, measurements)
    whole = stored(plan)
    first, last = whole["stages"]
    damaged_stages = [
        None, 5, "", "ab", {}, {"core": 16}, [], [first], [first, last, last], [first, None], [first, []], [first, {}],
        *([first, {**last, "core": tile}] for tile in (None, "32", 32.0, True, 0, -32, [32], [32, 0], [32, "32"], [32] * 3)),
    ]  # fmt: skip
    damaged = [
        {},
        *({**whole, "stages": stages} for stages in damaged_stages),
        *({**whole, "executor": name} for name in (None, 5, "", "rows", "auto", "batched", ["tiles"])),
        {key: value for key, value in whole.items() if key != "executor"},
    ]
    for data in damaged:
        assert stored_cut(data, request, measurements) is None, data
        assert plan.differences(data), data


def test_misaligned_stored_cuts_are_reported():
    """Comparison of plans reports a tile that fits no window, for instance one of another model."""
    request, windows = Request(executor="tiles"), measured(*[replace(COST, align=8)] * 2)
    old = stored(make_plan(request, windows))
    old["stages"][1]["core"] = 17
    plan = make_plan(request, windows, stored_cut(old, request, windows))
    assert any("core of step 3 17 there, 24 here" in line for line in plan.differences(old))
