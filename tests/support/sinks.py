"""What a sink must keep: inherit ``SinkTests``, say how to make one, how to open it again and how to read it."""

import numpy as np
import pytest

from engine.errors import EngineError
from engine.geometry import Box
from support.plans import bands_of, plan_of

PLANS = {
    "tiles of one shard": plan_of((200, 300), cores=(8, 16), halos=(0, 0)),
    "tiles of four shards": plan_of((150, 230), cores=(8, 16), halos=(0, 0), shard=32, chunk=16),
    "one shard": plan_of((50, 60), cores=(8, 16), halos=(0, 0)),
    "odd sizes": plan_of((257, 129), cores=(8, 16), halos=(0, 0), shard=32, chunk=32),
    "a region": plan_of((300, 420), cores=(8, 16), halos=(0, 0), roi=Box(33, 70, 200, 251)),
    "strips of one shard": bands_of((150, 230), cores=(8, 16), halos=(0, 0)),
    "strips of two shards": bands_of((257, 300), cores=(8, 32), halos=(0, 0), shard=64, chunk=32),
    "one strip that ends within a shard": bands_of((200, 150), cores=(16, 64), halos=(0, 0), shard=64, chunk=32),
    "a region in strips": bands_of((300, 420), cores=(8, 16), halos=(0, 0), roi=Box(33, 70, 200, 251)),
    "a row of pixels": plan_of((1, 700), cores=(8, 16), halos=(0, 0)),
}


def pixels_of(plan, seed=0):
    """uint8 [3, H, W]: every value, smooth and rough."""
    height, width = plan.size
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([y + x, 2 * y, 3 * x + 7]) % 256
    rough = np.random.default_rng(seed).integers(0, 256, smooth.shape)
    return np.where((y // 16 + x // 16) % 2, smooth, rough).astype(np.uint8)


def write_all(sink, pixels, boxes=None):
    for box in list(sink.missing()) if boxes is None else boxes:
        rows, columns = box.slices
        sink.write(box, pixels[:, rows, columns])


class SinkTests:
    """Inherit and give ``create(plan)``, ``reopen(plan)`` and ``read(sink)`` -> uint8 [3, H, W] as fixtures."""

    @pytest.fixture(params=PLANS)
    def plan(self, request):
        return PLANS[request.param]

    def test_everything_is_missing_at_first_in_the_plans_order(self, create, plan):
        assert list(create(plan).missing()) == list(plan.writes())

    def test_what_was_written_is_read_back(self, create, plan, read):
        sink, pixels = create(plan), pixels_of(plan)
        write_all(sink, pixels)
        assert list(sink.missing()) == []
        sink.finish()
        np.testing.assert_array_equal(read(sink), pixels)

    def test_a_written_box_is_no_longer_missing(self, create, plan):
        sink, pixels = create(plan), pixels_of(plan)
        boxes = list(plan.writes())
        write_all(sink, pixels, boxes[::2])
        assert list(sink.missing()) == boxes[1::2]

    def test_boxes_may_come_in_any_order_and_twice(self, create, plan, read):
        sink, pixels = create(plan), pixels_of(plan)
        boxes = list(plan.writes())
        np.random.default_rng(0).shuffle(boxes)
        write_all(sink, pixels, [*boxes, boxes[0]])
        sink.finish()
        np.testing.assert_array_equal(read(sink), pixels)

    def test_finish_refuses_while_something_is_missing(self, create, plan):
        sink = create(plan)
        write_all(sink, pixels_of(plan), list(plan.writes())[1:])
        with pytest.raises(EngineError, match="missing"):
            sink.finish()

    def test_reopened_it_goes_on_where_it_was(self, create, reopen, plan, read):
        pixels, boxes = pixels_of(plan), list(plan.writes())
        write_all(create(plan), pixels, boxes[::3])
        sink = reopen(plan)
        assert list(sink.missing()) == [box for i, box in enumerate(boxes) if i % 3]
        write_all(sink, pixels)
        sink.finish()
        np.testing.assert_array_equal(read(reopen(plan)), pixels)

    def test_finish_may_be_called_again(self, create, reopen, plan, read):
        sink, pixels = create(plan), pixels_of(plan)
        write_all(sink, pixels)
        sink.finish()
        sink.finish()
        reopen(plan).finish()
        np.testing.assert_array_equal(read(sink), pixels)
