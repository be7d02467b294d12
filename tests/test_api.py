"""The Python API: one call renders, a store is read as numpy regions, a render can be cancelled and resumed."""

import inspect
import pydoc
import re

import numpy as np
import pytest
import tifffile
from support.stores import attributes, files, pixels

import engine
from engine import errors
from engine.errors import InputError, Interrupted, UsageError
from engine.model.bundle import DEFAULT

OPTIONS = {
    "size": (256, 192),
    "stages": 2,
    "tile": 16,
    "overlap": "4",
    "precision": "fp32",
    "executor": "tiles",
    "seed": 3,
}


def test_render_and_read(tmp_path, model_file):
    progress = []
    result = engine.render(model_file, tmp_path / "out.zarr", **OPTIONS, on_progress=progress.append)
    assert result.path == tmp_path / "out.zarr"
    assert result.measurements.writes == 12
    assert progress[-1].done == progress[-1].total == sum(result.projection.lr_pixels)
    assert {p.step for p in progress} == {2, 3}

    store = engine.open(result.path)
    assert (store.size, store.complete) == ((256, 192), True)
    assert store.provenance["plan"] == result.plan.to_json()
    whole = pixels(result.path).transpose(1, 2, 0)
    np.testing.assert_array_equal(store.read(), whole)
    box = engine.Box(17, 33, 100, 201)
    for region in (box, (33, 17, 168, 83), "33,17,168,83"):
        np.testing.assert_array_equal(store.read(region), whole[box.slices])
    for index in ((slice(17, 100), slice(33, 201)), slice(-9, None), (slice(5, 5), slice(9)), ...):
        np.testing.assert_array_equal(store[index], whole[index])
    for level, (width, height) in enumerate(store.levels):
        np.testing.assert_array_equal(store.read(level=level), pixels(result.path, level).transpose(1, 2, 0))
        assert store.read(level=level).shape == (height, width, 3)


def test_loaded_model_and_picture(tmp_path, model_file):
    model = engine.load(model_file)
    first = engine.render(model, tmp_path / "first.zarr", **OPTIONS)
    picture = engine.export(first.path, tmp_path / "first.png").path
    enlarged = engine.render(
        model_file.parent / "sr.safetensors",
        tmp_path / "large.zarr",
        init=str(picture),
        overlap="4",
        tile=64,
        precision="fp32",
    )
    assert engine.open(enlarged.path).size == (4 * 256, 4 * 192)


def test_array_is_enlarged_as_its_file(tmp_path, model_file, picture):
    """Of both depths, bit for bit, also resampled; an equal array resumes the render."""
    network = model_file.parent / "sr.safetensors"
    for dtype, options in ((np.uint8, {"tile": 16}), (np.uint16, {"size": (120, 90)})):
        white = np.iinfo(dtype).max
        pixels_in = (picture(30, 40).permute(1, 2, 0).numpy() * white).round().astype(dtype)
        file = tmp_path / f"{white}.tif"
        tifffile.imwrite(file, pixels_in, photometric="rgb")
        options |= {"overlap": "4", "precision": "fp32"}
        expected = engine.render(network, tmp_path / f"file {white}.zarr", init=file, **options)
        result = engine.render(network, tmp_path / f"array {white}.zarr", init=pixels_in, **options)
        np.testing.assert_array_equal(engine.open(result.path)[...], engine.open(expected.path)[...])
        again = engine.render(network, result.path, init=np.asfortranarray(pixels_in), resume=True, **options)
        assert again.measurements.writes == 0
        other = pixels_in + np.array([1, 0, 0], dtype)
        with pytest.raises(engine.ResumeError, match="init_digest"):
            engine.render(network, result.path, init=other, resume=True, **options)
    for wrong in (np.zeros((3, 4, 5), np.uint8), np.zeros((4, 5, 3)), np.zeros((0, 5), np.uint8), object()):
        with pytest.raises(UsageError, match=r"init: .* give uint8, uint16 or float32 \[height, width, 1 to 4\]"):
            engine.render(network, tmp_path / "x.zarr", init=wrong)
    assert not (tmp_path / "x.zarr").exists()


def test_job_takes_texts(tmp_path, model_file):
    """Looked at, then rendered with the pixels of ``render``."""
    request = engine.Request(**OPTIONS | {"size": "256x192"})
    job = engine.Job.prepare(str(model_file), request, str(tmp_path / "job.zarr"))
    assert not job.out.exists()
    job.check()
    assert job.projection.host > 0
    result = job.render()
    expected = engine.render(str(model_file), str(tmp_path / "out.zarr"), **OPTIONS)
    np.testing.assert_array_equal(engine.open(str(result.path))[...], engine.open(expected.path)[...])
    with pytest.raises(engine.ResumeError):
        job.render()
    with pytest.raises(engine.BudgetError):
        engine.Job.prepare(model_file, engine.Request(size="256x192", memory="1MiB"), tmp_path / "x.zarr").check()


def test_model_has_a_default(tmp_path):
    """The packaged model of a photograph, or RealSR to enlarge a picture."""
    steps = len(engine.load(DEFAULT).stages)
    with pytest.raises(UsageError, match=f"the model has {steps} super-resolution steps"):
        engine.render(None, tmp_path / "out.zarr", stages=99)
    with pytest.raises(InputError, match=r"^(realsr|none.png): "):
        engine.render(None, tmp_path / "out.zarr", init="none.png")


def test_cancelled_render_is_resumed_to_the_same_bits(tmp_path, model_file):
    engine.render(model_file, tmp_path / "whole" / "out.zarr", **OPTIONS)
    writes = iter([False, False, True])
    with pytest.raises(Interrupted, match="resume=True goes on"):
        engine.render(model_file, tmp_path / "part" / "out.zarr", **OPTIONS, cancelled=lambda: next(writes))
    store = engine.open(tmp_path / "part" / "out.zarr")
    assert not store.complete
    assert store.read(engine.Box(0, 0, 64, 64)).any()
    assert not store.read(engine.Box(128, 192, 192, 256)).any()  # not rendered yet
    engine.render(model_file, tmp_path / "part" / "out.zarr", **OPTIONS, resume=True)
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert attributes(tmp_path / "part" / "out.zarr")["complete"]


def test_refusals(tmp_path, model_file):
    result = engine.render(model_file, tmp_path / "out.zarr", **OPTIONS)
    with pytest.raises(engine.EngineError, match="overwrite=True"):
        engine.render(model_file, tmp_path / "out.zarr", **OPTIONS)
    with pytest.raises(UsageError, match=r"level 0 \(256x192\)"):
        engine.open(result.path).read(engine.Box(0, 0, 193, 10))
    for region in ((0, 0, 257, 10), "0,0,257,10"):
        with pytest.raises(UsageError, match=r"the region 0,0,257,10 leaves level 0 \(256x192\)"):
            engine.open(result.path).read(region)
    for index in (5, (slice(9), 5), slice(0, 9, 2), (slice(9),) * 3):
        with pytest.raises(UsageError, match=r"use slices .* \[y0:y1, x0:x1\]"):
            engine.open(result.path)[index]
    with pytest.raises(UsageError, match="no such level"):
        engine.open(result.path).read(level=9)
    with pytest.raises(InputError, match="none.zarr"):
        engine.open(tmp_path / "none.zarr")


def test_every_public_name_is_in_the_help():
    for name in engine.__all__:
        assert name == "__version__" or re.search(rf"\b{name}\b", engine.__doc__), name
        assert name == "__version__" or inspect.getdoc(getattr(engine, name)), name
    assert dir(engine) == sorted(engine.__all__)
    assert {name for name, kind in vars(errors).items() if isinstance(kind, type)} <= set(engine.__all__)
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = engine.nothing
    assert "Annotated[" not in pydoc.plain(pydoc.render_doc(engine))
