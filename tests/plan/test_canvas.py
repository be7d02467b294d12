"""Canvas: base image, number of stages and reduction of a size."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.errors import UsageError
from engine.plan.canvas import Canvas, canvas_of_picture, canvas_of_scene, repetitions

quick = settings(deadline=None, derandomize=True, max_examples=100)
sides = st.integers(1, 70_000)
sizes = st.tuples(sides, sides)
SCALES = [4, 4, 4]

SCENES = [
    # size, step 1's own size, base, stages, enlarged
    # The paper: a base 256 wide and three stages of 4.
    ((8640, 16384), (135, 256), (135, 256), 3, None),
    ((2160, 4096), (135, 256), (135, 256), 2, None),
    ((540, 1024), (135, 256), (135, 256), 1, None),
    # A width of 4096 or 16384 needs no reduction, whatever the height; 10912 = 64 * 170.5: the base is rounded up.
    ((9152, 16384), (135, 256), (143, 256), 3, None),
    ((10912, 16384), (135, 256), (171, 256), 3, None),
    ((4096, 4096), (192, 256), (256, 256), 2, None),
    ((2048, 8192), (192, 256), (96, 384), 3, (6144, 24576)),
    # In between, the enlargement is reduced.
    ((768, 1024), (192, 256), (192, 256), 1, None),
    ((769, 1025), (192, 256), (193, 256), 2, (3073, 4096)),
    ((1080, 1920), (192, 256), (144, 256), 2, (2304, 4096)),
    ((768, 1366), (192, 256), (144, 256), 2, (2303, 4096)),
    ((2000, 1500), (192, 256), (256, 192), 2, (4096, 3072)),
    ((1, 1), (192, 256), (256, 256), 1, (1024, 1024)),
]

PICTURES = [
    # size, picture, scales, base, stages, enlarged
    (None, (256, 384), [4], (256, 384), 1, None),
    ((1024, 1536), (256, 384), [4], (256, 384), 1, None),
    ((512, 768), (256, 384), [4], (256, 384), 1, (1024, 1536)),
    ((128, 192), (256, 384), [4], (256, 384), 1, (1024, 1536)),
    ((2048, 3072), (256, 384), [4, 4], (256, 384), 2, (4096, 6144)),
    # Beyond all stages the picture itself is enlarged first.
    ((2048, 3072), (256, 384), [4], (512, 768), 1, None),
    ((30, 40), (3, 4), [3, 4], (3, 4), 2, (36, 48)),
]

REFUSALS = [
    (lambda: canvas_of_scene((100, 100), (10, 10), [4, 4], 0), "stages=0: the model has 2 super-resolution steps; use"),
    (lambda: canvas_of_picture((40, 40), (10, 10), [4, 4], 3), "stages=3: the model has 2 super-resolution steps; use"),
    (lambda: canvas_of_picture((40, 40), (10, 10), [4], 2), "stages=2: the model has 1 super-resolution step; use 1"),
    (lambda: canvas_of_scene((0, 100), (10, 10), [4, 4], None), "size='100x0': has an empty side"),
    (lambda: canvas_of_picture((0, 100), (10, 10), [4, 4], None), "size='100x0': has an empty side"),
]


@pytest.mark.parametrize(("size", "native", "base", "stages", "enlarged"), SCENES)
def test_scenes(size, native, base, stages, enlarged):
    assert canvas_of_scene(size, native, SCALES, None) == Canvas(size, base, stages, enlarged=enlarged)


@quick
@given(sizes, st.tuples(*[st.integers(8, 400)] * 2), st.integers(1, 40))
def test_scene_depends_on_the_shape_alone(size, native, times):
    """Sizes of the same shape have the same base, unless one of them is beyond all stages."""
    small, large = (canvas_of_scene((n * size[0], n * size[1]), native, SCALES, None) for n in (1, times))
    assume(large.keeps_scene)
    assert small.base == large.base


@quick
@given(sizes, st.tuples(*[st.integers(8, 400)] * 2), st.none() | st.integers(1, 3))
def test_base_covers_the_size_and_no_more(size, native, stages):
    scales = [4, 2, 3]
    canvas = canvas_of_scene(size, native, scales, stages)
    factor = math.prod(scales[: canvas.stages])
    source = canvas.reduction.source
    assert canvas.size == canvas.reduction.target == size
    assert all(0 <= b * factor - n < factor for b, n in zip(canvas.base, source, strict=True))
    assert all(a >= b for a, b in zip(source, size, strict=True))
    # Both sides are reduced alike, to a pixel.
    ratio = max(source) / max(size)
    assert all(abs(a - b * ratio) < 1 for a, b in zip(source, size, strict=True))
    if stages is not None:
        assert (canvas.stages, canvas.enlarged, canvas.keeps_scene) == (stages, None, False)
    elif canvas.stages > 1 and canvas.keeps_scene:  # one stage less is too small
        assert max(source) // scales[canvas.stages - 1] < max(size)


def test_size_beyond_all_stages_has_a_base_of_its_own():
    canvas = canvas_of_scene((24576, 32768), (192, 256), SCALES, None)
    assert canvas == Canvas((24576, 32768), (384, 512), 3, keeps_scene=False)


def test_default_size_is_all_stages_of_native():
    assert canvas_of_scene(None, (135, 256), SCALES, None) == Canvas((8640, 16384), (135, 256), 3)
    assert canvas_of_scene(None, (135, 256), SCALES, 1) == Canvas((540, 1024), (135, 256), 1)


def test_margin_adds_to_the_base_only():
    canvas = canvas_of_scene((8640, 16384), (135, 256), SCALES, None).with_margin(8)
    assert canvas == Canvas((8640, 16384), (151, 272), 3, 8)


@pytest.mark.parametrize(("size", "picture", "scales", "base", "stages", "enlarged"), PICTURES)
def test_pictures(size, picture, scales, base, stages, enlarged):
    canvas = canvas_of_picture(size, picture, scales, None)
    assert (canvas.base, canvas.stages, canvas.enlarged) == (base, stages, enlarged)
    assert size is None or canvas.size == size


@quick
@given(st.tuples(*[st.integers(200, 5000)] * 2), st.floats(0.5, 90))
def test_pictures_are_never_reduced_first(picture, factor):
    size = tuple(round(n * factor) for n in picture)
    canvas = canvas_of_picture(size, picture, SCALES, None)
    assert all(b >= n for b, n in zip(canvas.base, picture, strict=True))


def test_lone_network_runs_as_often_as_the_size_takes():
    assert repetitions((256, 384), None, 4, None) == 1
    assert repetitions((256, 384), (512, 768), 4, None) == 1
    assert repetitions((256, 384), (1025, 1537), 4, None) == 2
    assert repetitions((256, 384), (65536, 98304), 4, None) == 3
    assert repetitions((256, 384), (1024, 1536), 4, 2) == 2
    assert repetitions((256, 384), (1024, 1536), 1, None) == 1
    assert repetitions((256, 384), None, 1, 2) == 2


def test_chain_with_a_network_that_enlarges_nothing():
    """All of it runs, then the result is reduced; beyond its enlargement the picture is resampled first."""
    for size, base, enlarged in (
        (None, (30, 40), None),
        ((60, 80), (30, 40), (120, 160)),
        ((30, 40), (30, 40), (120, 160)),
        ((240, 320), (60, 80), None),
    ):
        canvas = canvas_of_picture(size, (30, 40), [1, 4], 2)
        assert (canvas.base, canvas.stages, canvas.enlarged) == (base, 2, enlarged)


def test_steps_that_do_not_enlarge_belong_to_the_step_before():
    scales = (1, 2, 1, 1, 3, 1)
    for factor, stages in {1: 1, 2: 4, 3: 6, 6: 6}.items():
        canvas = canvas_of_picture((factor * 20, factor * 30), (20, 30), scales, None)
        assert (canvas.base, canvas.stages) == ((20, 30), stages)
    assert canvas_of_scene((40, 60), (20, 30), (2, 1, 2), None).stages == 2


def test_stretched_pictures_are_refused():
    for size in ((3000, 4000), (3059, 4000), (2942, 4000), (3, 4), (1, 1)):
        canvas_of_picture(size, (300, 400), SCALES, None)
    with pytest.raises(UsageError) as caught:
        canvas_of_picture((4000, 4000), (300, 400), SCALES, None)
    assert caught.value.for_command_line() == (
        "--size 4000x4000: would stretch the picture of 400x300 by 25%; use 4000x3000, or leave it out"
    )
    for height in (2900, 3100):
        with pytest.raises(UsageError, match="by 3%; use 4000x3000"):
            canvas_of_picture((height, 4000), (300, 400), SCALES, None)


@quick
@given(st.tuples(*[st.integers(1, 5000)] * 2), st.integers(1000, 50_000), st.integers(1, 50_000))
def test_aspect_advice_is_accepted(picture, width, height):
    try:
        canvas_of_picture((height, width), picture, SCALES, None)
    except UsageError as error:
        advice = int(str(error).split(f"use {width}x")[1].split(",")[0])
        canvas_of_picture((advice, width), picture, SCALES, None)


@pytest.mark.parametrize(("make", "words"), REFUSALS)
def test_canvas_refusals(make, words):
    with pytest.raises(UsageError) as caught:
        make()
    assert words in str(caught.value)
