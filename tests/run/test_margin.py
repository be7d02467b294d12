"""The margin: what lies beyond the image's sides is made as context, and no border of a network's is seen.

A render with a margin is the inner part of a larger one without, whatever makes it.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
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
    "tiles": Request(executor="tiles", tile=16),
    "one tile": Request(executor="tiles", tile=512),
    "blended": Request(executor="tiles", tile=16, blend=8),
    "bands": Request(executor="bands"),
    "strips": Request(executor="bands", tile=16),
    "batched": Request(executor="batched", tile=16, device="cpu"),
}


@pytest.fixture(scope="module")
def framed(tmp_path_factory, model_file, swin_model_file):
    """(name, stages) -> the models of the other tests, two stages or one, with a margin."""
    sources = {"rrdb": model_file, "swinir": swin_model_file}

    @cache
    def make(name, stages=2, margin=MARGIN):
        folder = sources[name].parent
        path = tmp_path_factory.mktemp("framed") / "model.safetensors"
        parts = (folder / "structure.safetensors", [str(folder / "sr.safetensors")] * stages)
        build(*parts, [0.05] * stages, margin=margin).save(path)
        return model.load(path)

    return make


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_what_is_made_is_the_inner_part_of_a_larger_image(tmp_path, framed, name, executor):
    """With exact halos, and to ties of rounding: another tile is another sum."""
    asked = replace(EXECUTORS[executor], size=SIZE, stages=2, overlap="exact", precision="fp32")
    job = render(framed(name), asked, tmp_path / "inner.zarr")
    # SwinIR's windows are 8 pixels of the last stage, which are 2 of step 1's.
    factor, margin = 16, 4 if name == "swinir" else MARGIN
    assert job.plan.base == tuple(n // factor + 2 * margin for n in SIZE)
    assert job.seam_error == 0.0
    whole = replace(asked, size=tuple(n + 2 * margin * factor for n in SIZE), executor="tiles", tile=512, blend=0)
    larger = pixels(render(framed(name, margin=0), whole, tmp_path / "larger.zarr").out)
    expected = larger[:, margin * factor : -margin * factor, margin * factor : -margin * factor]
    difference = np.abs(pixels(job.out).astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001
    assert expected.std() > 5


@pytest.mark.parametrize("executor", ["tiles", "bands", "batched"])
def test_a_region_is_the_crop_and_its_corner_is_the_images(tmp_path, framed, executor):
    """The canvas begins behind the margin: where a region lies does not depend on it."""
    asked = replace(EXECUTORS[executor], size=SIZE, stages=2, overlap="exact", precision="fp32")
    full = pixels(render(framed("rrdb"), asked, tmp_path / "full.zarr").out)
    for index, box in enumerate((Box(0, 0, 40, 50), Box(33, 65, 90, 190), Box(150, 200, 192, 256))):
        job = render(framed("rrdb"), replace(asked, roi=box), tmp_path / f"{index}.zarr")
        difference = np.abs(pixels(job.out).astype(int) - full[(slice(None), *box.slices)])
        assert difference.max() <= (1 if executor == "bands" else 0)


@pytest.mark.parametrize("size", [(192, 256), (190, 250), (177, 241)])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_any_size_is_filled(tmp_path, framed, executor, size):
    """A size that the scales do not divide is cropped at its end, inside the margin."""
    job = render(framed("rrdb"), replace(EXECUTORS[executor], size=size, stages=2, overlap="4"), tmp_path / "o.zarr")
    made = pixels(job.out)
    assert made.shape == (3, *size)
    assert min(made[:, -4:].std(), made[:, :, -4:].std(), made[:, :4].std(), made[:, :, :4].std()) > 1


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_is_projected_is_what_is_reported(tmp_path, framed, executor):
    """Progress ends at 100 %: to a band of rows, or to the tile."""
    ran = [0, 0]

    def on_tile(stage, count):
        ran[stage] += count

    job = Job.prepare(
        framed("rrdb"), replace(EXECUTORS[executor], size=SIZE, stages=2, overlap="4"), tmp_path / "o.zarr"
    )
    for _ in job.run(job.open_sink(resume=False, overwrite=False), on_tile):
        pass
    for stage, projected, reported in zip(job.plan.stages, job.projection.lr_pixels, ran, strict=True):
        assert abs(projected - reported) <= stage.band * stage.width * len(list(job.plan.column_strips()))
        assert reported


def test_a_picture_that_is_given_has_no_margin(tmp_path, framed, picture):
    from PIL import Image

    values = (picture(40, 50).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "p.png")
    job = Job.prepare(framed("rrdb"), Request(init=tmp_path / "p.png", stages=1), tmp_path / "o.zarr")
    assert job.plan.base == (40, 50)
    assert job.plan.size == (160, 200)
    assert job.plan.stages[-1].margin == 0


def test_one_stage_of_windows_takes_a_whole_window(tmp_path, framed):
    """A margin that would put the image off the grid of windows is wider, not refused."""
    job = Job.prepare(framed("swinir", stages=1), Request(size=(96, 128)), tmp_path / "o.zarr")
    assert job.plan.stages[-1].margin == 8
    assert job.plan.base == (24 + 16, 32 + 16)
    job.plan.stages[-1].check()
    with pytest.raises(AlignmentError):
        replace(job.plan.stages[-1], margin=MARGIN).check()


@pytest.mark.parametrize("name", ["rrdb", "swinir"])
def test_of_three_stages_the_last_reads_no_more_than_the_one_before(tmp_path, framed, name):
    """What a margin has grown to beyond the context is cut off on the way; however it is cut, the pixels are the same."""
    model, made = framed(name, stages=3, margin=8), {}
    for executor, asked in EXECUTORS.items():
        if executor == "blended":
            continue
        asked = replace(asked, size=(256, 320), stages=3, overlap="exact", precision="fp32")
        job = render(model, asked, tmp_path / f"{executor}.zarr")
        assert [s.margin for s in job.plan.stages] == [0, 24, 32]
        assert [(s.height, s.width) for s in job.plan.stages] == [(20, 21), (80, 84), (128, 144)]
        assert (job.plan.margin, job.plan.base) == (8, (20, 21))
        assert job.seam_error == 0.0
        made[executor] = pixels(job.out).astype(int)
    for executor, values in made.items():
        difference = np.abs(values - made["one tile"])
        assert difference.max() <= 1, executor
        assert (difference > 0).mean() < 0.001, executor
    assert made["bands"].std() > 5


def test_a_margin_is_resumed(tmp_path, framed):
    asked = replace(EXECUTORS["tiles"], size=SIZE, stages=2, overlap="4")
    full = pixels(render(framed("rrdb"), asked, tmp_path / "full.zarr").out)
    render(framed("rrdb"), asked, tmp_path / "cut.zarr", most=1)
    again = render(framed("rrdb"), asked, tmp_path / "cut.zarr", resume=True)
    np.testing.assert_array_equal(pixels(again.out), full)
