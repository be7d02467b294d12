"""Shares of a plan: whole, balanced by work, and cut where a cut is cheap."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from support.plans import bands_of, cost_of, measured_of, plan_of

from engine.geometry import Box
from engine.plan.make import project
from engine.plan.measured import BandCost
from engine.plan.parts import Shares
from engine.plan.plan import Plan

MEASURED = measured_of([cost_of(per_pixel=1, seconds=1e-6, bands=BandCost(16, 1, 1e-6), radius=20)] * 2)


def work(plan, first, last):
    """LR pixels of a range of writes."""
    return sum(project(plan, MEASURED, list(plan.writes())[first:last]).lr_pixels)


@pytest.mark.parametrize(
    "plan",
    [
        bands_of((700, 1000), shard=64, chunk=64, cores=(64, 256)),
        bands_of((700, 512), shard=64, chunk=64, cores=(16, 64)),
        plan_of(),
        plan_of(roi=Box(3, 5, 600, 900)),
    ],
    ids=["bands", "bands in 2 strips", "tiles", "a region"],
)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 1000])
def test_shares_are_all_writes_once(plan, count):
    shares = Shares.of(plan, MEASURED, count)
    assert [box for part in shares.parts for box in shares.writes(plan, part)] == list(plan.writes())
    assert len(list(shares.parts)) == count
    assert Shares.from_json(shares.to_json(), plan) == shares
    assert Plan.from_json(plan.to_json()) == plan
    # One strip a part repeats no row, and tiles of inner stages are shared.
    strips = len(list(plan.column_strips())) if plan.is_banded else 0
    is_free = count == 1 or count == strips or plan.writes_tiles
    overhead = shares.overhead(plan, MEASURED)
    assert overhead == pytest.approx(0) if is_free else overhead > 0


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("cores", [(64, 256), (16, 64)], ids=["one strip", "two strips"])
def test_the_largest_share_of_bands_is_the_least(count, cores):
    plan = bands_of((700, 512), shard=64, chunk=64, cores=cores)
    total = len(list(plan.writes()))
    best = min(
        max(work(plan, *cut) for cut in pairwise((0, *cuts, total)))
        for cuts in combinations(range(1, total), count - 1)
    )
    bounds = Shares.of(plan, MEASURED, count).bounds
    assert max(work(plan, *cut) for cut in pairwise(bounds)) <= best * 1.002
    if total == 22 and count % 2 == 0:
        assert 11 in bounds  # between the strips, which costs nothing


def test_tiles_are_shared_equally():
    plan = plan_of()
    sizes = [last - first for first, last in pairwise(Shares.of(plan, MEASURED, 7).bounds)]
    assert max(sizes) - min(sizes) == 1
    region = replace(plan, roi=Box(0, 0, 600, 900))
    shares = Shares.of(region, MEASURED, 2)
    areas = [sum(box.area for box in shares.writes(region, part)) for part in shares.parts]
    assert max(areas) - min(areas) <= 2 * max(box.area for box in region.writes())


@pytest.mark.parametrize("stored", [None, 3, [0], [0, 5], [1, 2], [0, 9, 3, 48], ["0", "48"], [0, True]])
def test_damaged_shares_are_noticed(stored):
    with pytest.raises(ValueError, match="divide"):
        Shares.from_json(stored, plan_of())
