"""Rooflines of counted operations, and the table of GPUs."""

import pytest

from engine.errors import UsageError
from engine.plan.gpus import GPUS, find_gpu
from engine.plan.roofline import LAUNCH_SECONDS, Counts, Operation, Times

GPU = GPUS["rtx-4090"]


def test_every_operation_is_held_to_the_ceiling_that_binds_it():
    product = Operation(int(GPU.half * 1e12), 1000, is_half=True)  # one second
    single = Operation(int(GPU.single * 2e12), 1000, is_half=False)  # two
    copy = Operation(0, int(GPU.bandwidth * 3e9), is_half=True)  # three
    small = Operation(10, 10, is_half=True)
    counts = Counts(100, (product, single, copy, small, small))
    times = counts.times(GPU, 100)
    assert times.arithmetic == pytest.approx(3)
    assert times.traffic == pytest.approx(3)
    assert times.launches == pytest.approx(2 * LAUNCH_SECONDS)
    assert times.total == pytest.approx(6, rel=1e-4)
    assert sum(times.shares.values()) == pytest.approx(1)
    assert list(times.shares)[-1] == "launches"
    # Twice the pixels take twice as long, but as many launches.
    larger = counts.times(GPU, 200)
    assert larger.arithmetic == pytest.approx(2 * times.arithmetic)
    assert larger.launches == times.launches
    assert Times.sum([times, times.scaled(2)]).total == pytest.approx(3 * times.total)
    assert counts.flops_per_pixel == pytest.approx((product.flops + single.flops + 20) / 100)
    assert counts.launches == 5


def test_ceilings_of_geforce_are_those_of_float32_sums():
    """Tensor cores of a generation do as much for each multiprocessor and clock, on GeForce half of it with float32 sums."""
    for name, gpu in GPUS.items():
        ratio = gpu.half / gpu.single
        assert ratio == pytest.approx(2, rel=0.02) if name.startswith("rtx") else ratio > 3, name
        assert 0.5 < gpu.bandwidth / 240 < 21
        assert 1 <= gpu.cache <= 96


def test_gpus_are_found_by_any_spelling():
    for text in ("rtx-4090", "RTX 4090", "rtx4090"):
        assert find_gpu(text) is GPU
    with pytest.raises(UsageError, match="gpu='voodoo': no published figures of it here; use one of rtx-3060, "):
        find_gpu("voodoo")
