"""Row buffers: packing in one arena, and the rows that readers see in every band."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.bands.buffers import Buffer, BufferPlan, Slot, pack
from engine.bands.rules import Rows


def interval(first, last, rows):
    """A buffer of ``rows`` times 64 bytes, in use from operation ``first`` to operation ``last``."""
    slot = Slot("x", 0, 16, 0, 0)
    return BufferPlan((slot,), rows, 1, 16, torch.float32, advance=rows, oldest=0, first=first, last=last)


intervals = st.builds(
    lambda first, length, rows: interval(first, first + length, rows),
    first=st.integers(-1, 29),
    length=st.sampled_from([0, 1, 2, 5, 40]),
    rows=st.integers(1, 11),
)


def in_use(plans, position):
    return [i for i, plan in enumerate(plans) if plan.first <= position <= plan.last]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(intervals, min_size=1, max_size=40))
def test_packed_buffers_never_overlap_while_in_use(plans):
    offsets, total = pack(plans)
    for position in range(-1, 80):
        blocks = [
            byte // 64 for i in in_use(plans, position) for byte in range(offsets[i], offsets[i] + plans[i].nbytes, 64)
        ]
        assert len(set(blocks)) == len(blocks)
    assert all(offset >= 0 and offset % 64 == 0 for offset in offsets)
    assert total == max(offset + plan.nbytes for offset, plan in zip(offsets, plans, strict=True))
    lower_bound = max(sum(plans[i].nbytes for i in in_use(plans, position)) for position in range(-1, 80))
    assert lower_bound <= total <= sum(plan.nbytes for plan in plans)


def test_packing_by_hand():
    assert pack([]) == ([], 0)
    # One after the other: all at offset 0.
    assert pack([interval(2 * i, 2 * i + 1, 4) for i in range(9)]) == ([0] * 9, 256)
    # An operation reads one buffer and writes the other: both are in use at position 3.
    offsets, total = pack([interval(0, 3, 4), interval(3, 5, 4)])
    assert (sorted(offsets), total) == ([0, 256], 512)
    # A small buffer lies in the gap between two.
    plans = [interval(0, 9, 8), interval(0, 2, 4), interval(0, 9, 2), interval(5, 9, 3)]
    assert pack(plans) == ([0, 512, 768, 512], 14 * 64)


def test_sizes_are_aligned_for_any_dtype():
    plan = BufferPlan((Slot("x", 0, 3, 0, 0),), 5, 7, 3, torch.bfloat16, advance=5, oldest=0, first=0, last=0)
    assert plan.nbytes == 256  # 210


def two_values(advance):
    """A buffer of ``a`` (one channel, delay 2) and ``b`` (two channels, delay 3).

    One convolution reads both at delay 4 with a row above and below; another reads ``a`` alone with two.
    """
    slots = (Slot("a", 0, 1, row=4, keep=4), Slot("b", 1, 2, row=3, keep=2))
    return BufferPlan(slots, advance + 4, 1, 3, torch.float32, advance, oldest=6, first=0, last=3)


def rows_of(value, delay, band, advance):
    """New rows of a band, [advance, 1, channels]: numbers that tell value and row, zero above the picture only."""
    y = torch.arange(advance) + band * advance - delay
    numbers = torch.where(y < 0, 0, y + 100.0)
    return numbers.view(-1, 1, 1) + (numbers.view(-1, 1, 1) > 0) * 1000 * torch.tensor(value)


A, B = [1.0], [2.0, 3.0]


def copy(pairs):
    for target, source in pairs:
        target.copy_(source)


def windows(plan, memory, bands):
    """Fill a buffer band by band and yield its readers' windows: of both values, and of ``a`` alone."""
    buffer = Buffer(plan, plan.new_state(memory.device), memory)
    for band in range(bands):
        if not plan.slides:
            memory.fill_(255)  # NaN: other buffers used the arena
        copy(buffer.before(plan.first))
        buffer.new_rows(plan.slots[0]).copy_(rows_of(A, 2, band, plan.advance))
        buffer.new_rows(plan.slots[1]).copy_(rows_of(B, 3, band, plan.advance))
        yield buffer.window(4, 1, 3).clone(), buffer.window(4, 2, 1).clone()
        copy(buffer.after(plan.last))


def test_windows_hold_the_right_rows_in_every_band():
    for advance, slides in [(1, True), (2, True), (3, True), (4, True), (5, False), (8, False)]:
        plan = two_values(advance)
        assert plan.slides is slides, advance
        memory = torch.full((plan.nbytes,), 255, dtype=torch.uint8)
        for band, (both, alone) in enumerate(windows(plan, memory, 7)):
            # At delay 4 the band's rows begin at band * advance - 4, with one row and two around them.
            assert torch.equal(both, rows_of(A + B, 5 - band * advance, 0, advance + 2)), (advance, band)
            assert torch.equal(alone, rows_of(A, 6 - band * advance, 0, advance + 4)), (advance, band)


def test_saved_bytes():
    assert two_values(5).saved_bytes == 4 * (4 * 1 + 2 * 2)
    assert two_values(4).saved_bytes == two_values(4).nbytes == 128  # 8 rows of 3 floats, rounded up


def test_overlaps_picture():
    # A band at ``top`` finds it with the rows [top - 6, top + 6), in a picture of 10.
    plan = two_values(8)
    assert [top for top in range(-16, 32) if plan.overlaps_picture(Rows(top, 8, 0, 10))] == list(range(-5, 16))
    # Two rows per four of the input: the rows [top / 2 - 6, top / 2), in a picture of 5.
    plan = two_values(2)
    assert [top for top in range(-16, 32) if plan.overlaps_picture(Rows(top, 4, 0, 10))] == list(range(1, 22))
