"""Canvas: base image and number of stages of a size."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.plan.canvas import Canvas, resolve_canvas

quick = settings(deadline=None, derandomize=True, max_examples=50)
sides = st.integers(1, 70_000)
sizes = st.tuples(sides, sides)

CHOICES = [
    # The paper: a base 256 wide and three stages of 4. 10912 = 64 * 170.5: the base is rounded up, the image cropped.
    ((8640, 16384), (135, 256), (135, 256), 3),
    ((9152, 16384), (143, 256), (143, 256), 3),
    ((10912, 16384), (170, 256), (171, 256), 3),
    ((2160, 4096), (135, 256), (135, 256), 2),
    ((540, 1024), (135, 256), (135, 256), 1),
    ((4097, 4097), (256, 256), (257, 257), 2),
    ((100, 100), (135, 256), (25, 25), 1),
    ((1, 1), (135, 256), (1, 1), 1),
    ((65536, 65536), (135, 256), (1024, 1024), 3),
]

REFUSALS = [
    (None, None, None, "init"),
    ((100, 100), (10, 10), 0, "stages=0: the model has 2 super-resolution steps; use 1 to 2"),
    ((100, 100), (10, 10), 3, "stages=3: the model has 2 super-resolution steps; use 1 to 2"),
    ((0, 100), (10, 10), None, "size='100x0': has an empty side"),
]


def test_base_is_nearest_to_native():
    for size, native, base, stages in CHOICES:
        canvas = resolve_canvas(size, native, [4, 4, 4], None)
        assert (canvas.size, canvas.base, canvas.stages) == (size, base, stages)


@quick
@given(sizes, st.none() | sizes, st.none() | st.integers(1, 3))
def test_base_covers_the_size_and_no_more(size, native, stages):
    scales = [4, 2, 3]
    canvas = resolve_canvas(size, native, scales, stages)
    factor = math.prod(scales[: canvas.stages])
    assert canvas.size == size
    assert canvas.stages == stages or (stages is None and 1 <= canvas.stages <= 3)
    assert all(0 <= b * factor - n < factor for b, n in zip(canvas.base, size, strict=True))


def test_default_size_is_all_stages_of_native():
    assert resolve_canvas(None, (135, 256), [4, 4, 4], None) == Canvas((8640, 16384), (135, 256), 3)
    assert resolve_canvas(None, (135, 256), [4, 4, 4], 1) == Canvas((540, 1024), (135, 256), 1)


def test_margin_adds_to_the_base_only():
    canvas = resolve_canvas((8640, 16384), (135, 256), [4, 4, 4], None).with_margin(8)
    assert canvas == Canvas((8640, 16384), (151, 272), 3, 8)


def test_size_without_native_image():
    assert resolve_canvas((1000, 1000), None, [4, 4], None).stages == 2


def test_canvas_refusals():
    for size, native, stages, words in REFUSALS:
        with pytest.raises(UsageError) as caught:
            resolve_canvas(size, native, [4, 4], stages)
        assert words in str(caught.value), (size, native, stages)
