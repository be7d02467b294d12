"""Buffers share an arena without meeting, and give every reader its rows band after band."""

import random

import pytest
import torch

from engine.bands.buffers import Buffer, BufferPlan, Slot, share
from engine.bands.graph import Rows


def interval(first, last, rows):
    """A buffer of ``rows`` times 64 bytes, in use from operation ``first`` to operation ``last``."""
    slot = Slot("x", 0, 16, 0, 0)
    return BufferPlan((slot,), rows, 1, 16, torch.float32, advance=rows, oldest=0, first=first, last=last)


def alive(plans, position):
    return [i for i, plan in enumerate(plans) if plan.first <= position <= plan.last]


@pytest.mark.parametrize("seed", range(20))
def test_buffers_in_use_together_never_overlap(seed):
    rng = random.Random(seed)
    plans = []
    for _ in range(rng.randrange(1, 40)):
        first = rng.randrange(-1, 30)
        plans.append(interval(first, first + rng.choice([0, 1, 2, 5, 40]), rng.randrange(1, 12)))
    offsets, total = share(plans)
    for position in range(-1, 80):
        taken = [
            byte // 64 for i in alive(plans, position) for byte in range(offsets[i], offsets[i] + plans[i].nbytes, 64)
        ]
        assert len(set(taken)) == len(taken)
    assert all(offset >= 0 and offset % 64 == 0 for offset in offsets)
    assert total == max(offset + plan.nbytes for offset, plan in zip(offsets, plans, strict=True))
    together = max(sum(plans[i].nbytes for i in alive(plans, position)) for position in range(-1, 80))
    assert together <= total <= sum(plan.nbytes for plan in plans)


def test_one_place_serves_one_buffer_after_the_other():
    one_after_the_other = [interval(2 * i, 2 * i + 1, 4) for i in range(9)]
    assert share(one_after_the_other) == ([0] * 9, 256)


def test_the_reader_of_one_buffer_may_write_another():
    """An operation reads and writes at one position: both are in use at it."""
    offsets, total = share([interval(0, 3, 4), interval(3, 5, 4)])
    assert sorted(offsets) == [0, 256]
    assert total == 512


def test_a_small_buffer_lies_in_the_gap_between_two():
    plans = [interval(0, 9, 8), interval(0, 2, 4), interval(0, 9, 2), interval(5, 9, 3)]
    offsets, total = share(plans)
    assert offsets == [0, 512, 768, 512]
    assert total == 14 * 64


def test_no_buffers_take_no_arena():
    assert share([]) == ([], 0)


def test_sizes_are_rounded_up_so_that_every_dtype_may_follow():
    plan = BufferPlan((Slot("x", 0, 3, 0, 0),), 5, 7, 3, torch.bfloat16, advance=5, oldest=0, first=0, last=0)
    assert plan.nbytes == 256  # 210


def dense(advance):
    """``a`` of one channel, two rows behind the input, and ``b`` of two channels, three rows behind it. A convolution
    reads both at a delay of 4 with a row on either side, another one ``a`` alone with two.
    """
    slots = (Slot("a", 0, 1, row=4, keep=4), Slot("b", 1, 2, row=3, keep=2))
    return BufferPlan(slots, advance + 4, 1, 3, torch.float32, advance, oldest=6, first=0, last=3)


def rows_of(value, delay, band, advance):
    """A band's new rows [advance, 1, channels]; every number tells the value and the row, none is zero but a border's."""
    y = torch.arange(advance) + band * advance - delay
    numbers = torch.where(y < 0, 0, y + 100.0)
    return numbers.view(-1, 1, 1) + (numbers.view(-1, 1, 1) > 0) * 1000 * torch.tensor(value)


A, B = [1.0], [2.0, 3.0]


def windows(plan, memory, bands):
    """Fill a buffer band by band: what its readers see in every band, of both values and of ``a`` alone."""
    buffer = Buffer(plan, memory)
    buffer.clear()
    for band in range(bands):
        if not plan.slides:
            memory.fill_(255)  # NaN: others have used the arena
        buffer.begin()
        buffer.new_rows(plan.slots[0]).copy_(rows_of(A, 2, band, plan.advance))
        buffer.new_rows(plan.slots[1]).copy_(rows_of(B, 3, band, plan.advance))
        yield buffer.window(4, 1, 3).clone(), buffer.window(4, 2, 1).clone()
        buffer.finish()


@pytest.mark.parametrize(("advance", "slides"), [(1, True), (2, True), (3, True), (4, True), (5, False), (8, False)])
def test_readers_find_the_rows_that_they_need_in_every_band(advance, slides):
    plan = dense(advance)
    assert plan.slides is slides
    memory = torch.full((plan.nbytes,), 255, dtype=torch.uint8)
    for band, (both, alone) in enumerate(windows(plan, memory, 7)):
        # At a delay of 4, the band's rows begin at band * advance - 4; around them lie one row and two.
        expected = rows_of(A + B, 5 - band * advance, 0, advance + 2)
        assert torch.equal(both, expected)
        assert torch.equal(alone, rows_of(A, 6 - band * advance, 0, advance + 4))


def test_what_is_held_from_band_to_band():
    assert dense(5).saved_bytes == 4 * (4 * 1 + 2 * 2)
    assert dense(4).saved_bytes == dense(4).nbytes == 128  # 8 rows of 3 floats, rounded up


@pytest.mark.parametrize("advance", [2, 8])
def test_after_clear_nothing_of_the_last_picture_is_left(advance):
    plan = dense(advance)
    buffer = Buffer(plan, torch.full((plan.nbytes,), 255, dtype=torch.uint8))
    for _ in range(3):
        buffer.begin()
        for slot in plan.slots:
            buffer.new_rows(slot).fill_(7.0)
        buffer.finish()
    buffer.clear()
    buffer.begin()
    for slot in plan.slots:
        buffer.new_rows(slot).fill_(1.0)
    assert buffer.window(4, 1, 3).unique().tolist() == [0.0, 1.0]


def test_a_buffer_is_skipped_where_all_of_its_rows_lie_outside():
    """A band at ``top`` finds it holding the rows [top - 6, top + 6), of a picture of 10."""
    plan = dense(8)
    assert [top for top in range(-16, 32) if plan.meets(Rows(top, 8, 0, 10))] == list(range(-5, 16))


def test_a_buffer_is_skipped_by_its_own_rate():
    """Two rows for every four of the input: it holds [top / 2 - 6, top / 2), of a picture of 5."""
    plan = dense(2)
    assert [top for top in range(-16, 32) if plan.meets(Rows(top, 4, 0, 10))] == list(range(1, 22))
