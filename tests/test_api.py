"""The Python API: one call renders, a store is read as numpy regions, a render can be cancelled and resumed."""

import inspect

import numpy as np
import pytest
from support.stores import attributes, files, pixels

import engine
from engine.errors import InputError, Interrupted, UsageError

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
    np.testing.assert_array_equal(store.read(box), whole[box.slices])
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
    with pytest.raises(UsageError, match="no such level"):
        engine.open(result.path).read(level=9)
    with pytest.raises(InputError, match="none.zarr"):
        engine.open(tmp_path / "none.zarr")


def test_help_names_every_public_name():
    for name in set(engine.__all__) - {"__version__", "Model", "Progress", "RenderResult", "Store"}:
        assert name in engine.__doc__, name
    for name in engine.__all__:
        assert name in dir(engine)
        if name != "__version__":
            assert inspect.getdoc(getattr(engine, name)), name
