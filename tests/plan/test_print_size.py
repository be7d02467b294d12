"""Pixels on paper."""

import pytest

from engine.errors import UsageError
from engine.plan.print_size import PrintSize, material_size, pixels_of_print


def test_sizes_are_said_in_cm_and_metres():
    assert str(PrintSize.of((3072, 4096), None)) == "34.7 x 26.0 cm at 300 dpi"
    assert str(PrintSize.of((12288, 16384), 150)) == "2.77 x 2.08 m at 150 dpi"
    assert str(PrintSize.of((8192, 512), 150)) == "0.09 x 1.39 m at 150 dpi"


@pytest.mark.parametrize("dpi", [None, 72, 150.5, 600])
@pytest.mark.parametrize("width_mm", [1, 210, 2770.5])
def test_pixels_give_the_print_back(width_mm, dpi):
    pixels = pixels_of_print(width_mm, dpi)
    assert abs(PrintSize.of((1, pixels), dpi).width_mm - width_mm) <= 25.4 / (dpi or 300) / 2 + 1e-9


@pytest.mark.parametrize("width_mm", [0, -5, float("nan"), float("inf"), 1e12])
def test_impossible_prints(width_mm):
    with pytest.raises(UsageError, match="width_mm"):
        pixels_of_print(width_mm, 300)


def test_materials_are_squares_of_powers_of_two():
    assert [material_size((n, n)) for n in (1000, 1024, 3000, 1)] == [(1024, 1024), None, (4096, 4096), None]
    assert material_size((1000, 1001)) is None
    assert material_size((1000, 2048), repeats=True) == (1024, 2048)
    assert material_size((1024, 2048), repeats=True) is None
