"""The margin: pixels beyond the image's sides are computed as context, so that no network's border is visible.

A render with a margin is the inner part of a larger render without one, by every executor.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image
from support.stores import pixels, render

from engine.errors import AlignmentError
from engine.geometry import Box
from engine.job import Job
from engine.model import bundle as model
from engine.model.build import build
from engine.plan.request import Request

MARGIN = 3
SIZE = (192, 256)
EXECUTORS = {
    "tiles": Request(executor="tiles", tile=16, precision="fp32"),
    "one tile": Request(executor="tiles", tile=512, precision="fp32"),
    "blended": Request(executor="tiles", tile=16, blend=8, precision="fp32"),
    "bands": Request(executor="bands", precision="fp32"),
    "strips": Request(executor="bands", tile=16, precision="fp32"),
    "batched": Request(executor="batched", tile=16, device="cpu", precision="fp32"),
}


@pytest.fixture(scope="module")
def framed(tmp_path_factory, model_file, swin_model_file):
    """Function ``framed(name, stages=2, margin=MARGIN)`` -> a model of the other tests with a margin."""
    sources = {"rrdb": model_file, "swinir": swin_model_file}

    @cache
    def make(name, stages=2, margin=MARGIN):
        folder = sources[name].parent
        path = tmp_path_factory.mktemp("framed") / "model.safetensors"
        parts = (folder / "structure.safetensors", [str(folder / "sr.safetensors")] * stages)
        build(*parts, [0.05] * stages, margin=margin).save(path)
        return model.load(path)

    return make


def assert_equal_to_rounding(output, expected):
    """Another tile is another order of sums: a value that lies between two levels may go to either."""
    difference = np.abs(output.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


@pytest.mark.parametrize("name", ["rrdb", pytest.param("swinir", marks=pytest.mark.slow)])
def test_image_is_the_inner_part_of_a_larger_one(tmp_path, framed, name):
    """With exact halos, by every executor."""
    # SwinIR's windows are 8 pixels of the last stage, which are 2 of step 1's.
    factor, margin = 16, 4 if name == "swinir" else MARGIN
    exact = {"stages": 2, "overlap": "exact"}
    larger_size = tuple(n + 2 * margin * factor for n in SIZE)
    whole = replace(EXECUTORS["one tile"], size=larger_size[::-1], **exact)
    larger = pixels(render(framed(name, margin=0), whole, tmp_path / "larger.zarr").out)
    expected = larger[:, margin * factor : -margin * factor, margin * factor : -margin * factor]
    assert expected.std() > 5
    for executor, request in EXECUTORS.items():
        job = render(framed(name), replace(request, size=SIZE[::-1], **exact), tmp_path / f"{executor}.zarr")
        assert job.plan.base == tuple(n // factor + 2 * margin for n in SIZE)
        assert job.seam_error == 0.0
        assert_equal_to_rounding(pixels(job.out), expected)


def test_region_is_the_crop(tmp_path, framed):
    """The canvas begins behind the margin: the place of a region does not depend on it."""
    for executor in ("tiles", "bands", "batched"):
        request = replace(EXECUTORS[executor], size=SIZE[::-1], stages=2, overlap="exact")
        full = pixels(render(framed("rrdb"), request, tmp_path / f"{executor}.zarr").out)
        for index, box in enumerate((Box(0, 0, 40, 50), Box(33, 65, 90, 190), Box(150, 200, 192, 256))):
            job = render(framed("rrdb"), replace(request, roi=box), tmp_path / f"{executor}-{index}.zarr")
            difference = np.abs(pixels(job.out).astype(int) - full[(slice(None), *box.slices)])
            assert difference.max() <= (1 if executor == "bands" else 0), (executor, box)


@pytest.mark.parametrize("size", [SIZE, (177, 241), pytest.param((190, 250), marks=pytest.mark.slow)])
def test_any_size_is_filled_and_its_projection_is_reported(tmp_path, framed, size):
    """A size that the scales do not divide is cropped at its end, inside the margin.

    Progress ends at 100 %: to a band of rows, or to the tile.
    """
    for executor, request in EXECUTORS.items():
        request = replace(request, size=size[::-1], stages=2, overlap="4")
        job = Job.prepare(framed("rrdb"), request, tmp_path / f"{executor}.zarr")
        reported = [0, 0]

        def add(position, lr_pixels, reported=reported):
            reported[position] += lr_pixels

        for _ in job.run(job.open_sink(resume=False, overwrite=False), add):
            pass
        image = pixels(job.out)
        assert image.shape == (3, *size)
        borders = (image[:, -4:], image[:, :, -4:], image[:, :4], image[:, :, :4])
        assert min(border.std() for border in borders) > 1, executor
        if size == SIZE:
            strips = len(list(job.plan.column_strips()))
            for stage, projected, count in zip(job.plan.stages, job.projection.lr_pixels, reported, strict=True):
                assert abs(projected - count) <= stage.band * stage.width * strips, executor
                assert count


def test_picture_has_no_margin(tmp_path, framed, picture):
    values = (picture(40, 50).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "p.png")
    request = Request(init=tmp_path / "p.png", stages=1, precision="fp32")
    job = Job.prepare(framed("rrdb"), request, tmp_path / "o.zarr")
    assert job.plan.base == (40, 50)
    assert job.plan.size == (160, 200)
    assert job.plan.stages[-1].margin == 0


def test_one_stage_of_windows_takes_a_whole_window(tmp_path, framed):
    """A margin that would put the image off the grid of windows becomes wider."""
    request = Request(size=(128, 96), precision="fp32")
    job = Job.prepare(framed("swinir", stages=1), request, tmp_path / "o.zarr")
    assert job.plan.stages[-1].margin == 8
    assert job.plan.base == (24 + 16, 32 + 16)
    job.plan.stages[-1].check()
    with pytest.raises(AlignmentError):
        replace(job.plan.stages[-1], margin=MARGIN).check()


@pytest.mark.parametrize(
    ("name", "executors"),
    [
        ("rrdb", ("one tile", "tiles", "bands")),
        pytest.param("rrdb", ("one tile", "bands", "strips", "batched"), marks=pytest.mark.slow),
        pytest.param("swinir", ("one tile", "tiles", "bands", "strips", "batched"), marks=pytest.mark.slow),
    ],
)
def test_margin_of_three_stages_is_cut_on_the_way(tmp_path, framed, name, executors):
    """The enlarged margin beyond the context is cut off; the pixels are equal by every executor."""
    model, images = framed(name, stages=3, margin=8), {}
    for executor in executors:
        request = replace(EXECUTORS[executor], size=(320, 256), stages=3, overlap="exact")
        job = render(model, request, tmp_path / f"{executor}.zarr")
        assert [s.margin for s in job.plan.stages] == [0, 24, 32]
        assert [(s.height, s.width) for s in job.plan.stages] == [(20, 21), (80, 84), (128, 144)]
        assert (job.plan.margin, job.plan.base) == (8, (20, 21))
        assert job.seam_error == 0.0
        images[executor] = pixels(job.out).astype(int)
    assert images["bands"].std() > 5
    for values in images.values():
        assert_equal_to_rounding(values, images["one tile"])


def test_margin_is_resumed(tmp_path, framed):
    request = replace(EXECUTORS["tiles"], size=SIZE[::-1], stages=2, overlap="4")
    full = pixels(render(framed("rrdb"), request, tmp_path / "full.zarr").out)
    render(framed("rrdb"), request, tmp_path / "cut.zarr", writes=1)
    resumed = render(framed("rrdb"), request, tmp_path / "cut.zarr", resume=True)
    np.testing.assert_array_equal(pixels(resumed.out), full)
