"""Reduction behind the last step: against Pillow, by any box, and the same in every executor."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.stores import pixels, render

from engine.geometry import Box
from engine.io.photo import TensorSource
from engine.plan.reduction import Reduction
from engine.plan.request import Request
from engine.run.finish import Finish
from engine.run.reduce import ReducedImage, ReducedRows
from engine.run.rows import SourceRows

SIZES = [((90, 130), (45, 65)), ((90, 130), (83, 121)), ((90, 130), (90, 121)), ((200, 300), (7, 11)), ((5, 9), (1, 2))]


def random_image(size):
    return torch.from_numpy(np.random.default_rng(3).random((3, *size), np.float32))


def by_pillow(image, size):
    """Lanczos reduction of every channel in float32, rounded to 8 bits."""
    channels = [Image.fromarray(c).resize(size[::-1], Image.Resampling.LANCZOS) for c in image.numpy()]
    return np.clip(np.stack([np.asarray(c) for c in channels]) * 255, 0, 255)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_reduction_is_lanczos(source, target):
    image = random_image(source)
    whole = ReducedImage(TensorSource(image), Reduction(source, target), Finish()).read(Box(0, 0, *target))
    assert np.abs(whole.numpy() - by_pillow(image, target)).max() < 0.51


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("dither", [False, True])
def test_every_box_and_stream_has_the_same_bits(source, target, dither):
    image, reduction = random_image(source), Reduction(source, target)
    finish = Finish(dither=dither)
    lazy = ReducedImage(TensorSource(image), reduction, finish)
    whole = lazy.read(Box(0, 0, *target)).numpy()
    for box in (Box(0, 0, 1, 1), Box(target[0] // 3, target[1] // 3, target[0], target[1])):
        np.testing.assert_array_equal(lazy.read(box).numpy(), whole[(slice(None), *box.slices)])
        columns = (box.x0, box.x1)
        source_rows = SourceRows(TensorSource(image), reduction.columns.read(*columns))
        rows = ReducedRows(source_rows, reduction, columns, finish)
        streamed = torch.cat([block.pixels for block in rows.rows(box.y0)], 1).numpy()
        np.testing.assert_array_equal(streamed, whole[:, box.y0 :, box.x0 : box.x1])


def test_executors_reduce_alike(tmp_path, models):
    """Bands, tiles and batches give the same reduced image; a region has the pixels of the whole."""
    common = {"size": (200, 150), "seed": 3, "overlap": "exact", "precision": "fp32", "dither": True}
    reference = None
    for executor in ("bands", "tiles", "batched"):
        device = "cpu" if executor == "batched" else None
        request = Request(executor=executor, device=device, **common)
        job = render(models["rrdb"], request, tmp_path / f"{executor}.zarr")
        assert job.plan.enlarged is not None
        image = pixels(job.out)
        reference = image if reference is None else reference
        difference = np.abs(image.astype(int) - reference).max()
        assert difference <= 1, executor  # networks round other shapes in another way
        region = render(
            models["rrdb"],
            Request(executor=executor, device=device, roi=Box(20, 30, 90, 150), **common),
            tmp_path / f"{executor} roi.zarr",
        )
        assert np.abs(pixels(region.out).astype(int) - image[:, 20:90, 30:150]).max() <= 1, executor


def test_stopped_render_resumes_with_the_same_bits(tmp_path, models):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (280, 40, 3), np.uint8)).save(picture)
    request = Request(init=picture, size=(150, 1050), seed=3, precision="fp32", executor="bands")
    whole = render(models["rrdb"], request, tmp_path / "whole.zarr")
    assert whole.plan.enlarged == (1120, 160)
    assert len(list(whole.plan.writes())) == 2
    render(models["rrdb"], request, tmp_path / "stopped.zarr", writes=1)
    render(models["rrdb"], request, tmp_path / "stopped.zarr", resume=True)
    np.testing.assert_array_equal(pixels(tmp_path / "stopped.zarr"), pixels(whole.out))
