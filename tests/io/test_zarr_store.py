"""The OME-Zarr store: its pyramid, what is left by a killed run, what is refused, and that others can read it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorstore
import zarr
from ome_zarr_models.v05.image import Image
from support.plans import plan_of
from support.sinks import PLANS, SinkTests, pixels_of, write_all

from engine.errors import EngineError, InputError, ResumeError
from engine.io.zarr_store import ZarrSink, halve, stored_plan

PLAN = PLANS["tiles of four shards"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.zarr"


@pytest.fixture
def create(path):
    return lambda plan, **options: ZarrSink.create(path, plan, {"licences": ["CC0-1.0: test"]}, **options)


@pytest.fixture
def reopen(path):
    return lambda plan: ZarrSink.resume(path, plan)


@pytest.fixture
def read():
    return lambda sink, level=0: zarr.open_array(sink.path / str(level), mode="r")[:]


@pytest.fixture
def finished(create):
    sink = create(PLAN)
    write_all(sink, pixels_of(PLAN))
    sink.finish()
    return sink


class TestZarrSink(SinkTests):
    @pytest.fixture
    def create(self, create):
        return create


# The pyramid


def mean_of_four(pixels):
    """An independent account of one halving: in integers, an odd border counts twice, halves go up."""
    c, h, w = pixels.shape
    padded = pixels[:, [*range(h), *[h - 1] * (h % 2)]][:, :, [*range(w), *[w - 1] * (w % 2)]].astype(int)
    sums = padded.reshape(c, -(-h // 2), 2, -(-w // 2), 2).sum(axis=(2, 4))
    return np.floor(sums / 4 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("order", ["forwards", "backwards", "resumed"])
def test_every_level_is_the_mean_of_the_one_below(create, reopen, read, name, order):
    plan = PLANS[name]
    sink, pixels, boxes = create(plan), pixels_of(plan), list(plan.writes())
    if order == "resumed":
        write_all(sink, pixels, boxes[: len(boxes) // 2])
        sink = reopen(plan)
        boxes = list(sink.missing())
    write_all(sink, pixels, boxes[::-1] if order == "backwards" else boxes)
    sink.finish()
    for level, size in enumerate(plan.pyramid):
        found = read(sink, level)
        assert found.shape == (3, *size)
        np.testing.assert_array_equal(found, pixels)
        pixels = mean_of_four(pixels)


def test_the_pyramid_grows_with_the_image(create):
    """No pass over the whole at the end: a shard of a level exists as soon as the four below it do."""
    sink, pixels, grid = create(PLAN), pixels_of(PLAN), PLAN.grid()
    boxes = list(PLAN.writes())
    write_all(sink, pixels, boxes[:1])
    assert {i for i in grid.indices() if (sink.path / "0/c/0" / str(i[0]) / str(i[1])).exists()} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }
    assert (sink.path / "1/c/0/0/0").exists()
    assert not (sink.path / "1/c/0/0/1").exists()
    assert not (sink.path / "2/c").exists()
    write_all(sink, pixels)
    levels = len(PLAN.pyramid)
    assert (sink.path / str(levels - 1) / "c/0/0/0").exists()


@pytest.mark.parametrize("value", [0, 255])
def test_a_flat_image_has_every_shard_of_every_level(create, reopen, value):
    """A store may leave out chunks of its fill value; here existence is the resume mark."""
    sink = create(PLAN)
    write_all(sink, np.full((3, *PLAN.size), value, np.uint8))
    assert list(sink.missing()) == []
    sink.finish()
    for level in range(len(PLAN.pyramid)):
        for row, column in PLAN.grid(level).indices():
            assert (sink.path / str(level) / "c" / "0" / str(row) / str(column)).stat().st_size > 0
    assert list(reopen(PLAN).missing()) == []


@pytest.mark.parametrize(("value", "mean"), [([0, 0, 0, 1], 0), ([0, 0, 1, 1], 1), ([255] * 4, 255), ([1, 2, 2, 2], 2)])
def test_halve_rounds_halves_up(value, mean):
    assert halve(np.array(value, np.uint8).reshape(1, 2, 2)).item() == mean


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 5), (4, 4)])
def test_halve_of_odd_sizes(size):
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size)).astype(np.uint8)
    np.testing.assert_array_equal(halve(pixels), mean_of_four(pixels))


# What a killed run leaves


def test_a_partial_shard_is_missing_and_removed_on_resume(create, reopen, path):
    boxes = list(PLAN.writes())
    write_all(create(PLAN), pixels_of(PLAN), boxes[1:])
    leftovers = [path / "0/c/0/0/0.1234.partial", path / "1/c/0/0/0.1234.partial"]
    for leftover in leftovers:
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_bytes(b"half a shard")
    sink = reopen(PLAN)
    assert list(sink.missing()) == boxes[:1]
    assert not any(leftover.exists() for leftover in leftovers)
    assert not list(path.rglob("*.partial"))


def test_an_empty_shard_is_missing(create, reopen, path, read):
    """What a loss of power can leave of a file that was renamed before its content was on the disk."""
    pixels, boxes = pixels_of(PLAN), list(PLAN.writes())
    write_all(create(PLAN), pixels)
    (path / "0/c/0/1/1").write_bytes(b"")
    (path / "1/c/0/0/0").write_bytes(b"")
    sink = reopen(PLAN)
    assert list(sink.missing()) == boxes[:1]
    write_all(sink, pixels)
    sink.finish()
    np.testing.assert_array_equal(read(sink, 1), mean_of_four(pixels))


def test_finish_makes_what_a_killed_run_left_out_of_the_pyramid(create, reopen, path, read):
    pixels = pixels_of(PLAN)
    write_all(create(PLAN), pixels)
    shutil.rmtree(path / "1/c/0/1")
    shutil.rmtree(path / "2/c")
    sink = reopen(PLAN)
    assert list(sink.missing()) == []
    sink.finish()
    np.testing.assert_array_equal(read(sink, 1), mean_of_four(pixels))
    np.testing.assert_array_equal(read(sink, 2), mean_of_four(mean_of_four(pixels)))


def test_only_finish_marks_the_store_complete(create, reopen):
    sink = create(PLAN)
    write_all(sink, pixels_of(PLAN))
    assert not sink.complete
    assert not reopen(PLAN).complete
    sink.finish()
    assert sink.complete
    assert reopen(PLAN).complete


def test_finish_names_the_missing_shard(create):
    sink = create(PLAN)
    write_all(sink, pixels_of(PLAN), list(PLAN.writes())[:-1])
    with pytest.raises(ResumeError, match=r"out.zarr: shard \(\d+, \d+\) is missing; .*--resume"):
        sink.finish()
    assert not sink.complete


def test_a_stale_part_folder_is_replaced(create, path):
    """Of a run that was killed while it made the store."""
    part = path.with_name("out.zarr.part")
    (part / "0").mkdir(parents=True)
    (part / "zarr.json").write_text("{")
    create(PLAN)
    assert not part.exists()
    assert stored_plan(path) == PLAN.to_json()


def test_a_store_of_the_final_name_is_whole_from_the_start(create, path, monkeypatch):
    """Killed at any moment of its making, there is no store of the final name."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.io.zarr_store.ome.image_metadata", killed)
    with pytest.raises(KeyboardInterrupt):
        create(PLAN)
    assert not path.exists()


# Refusals


def test_an_existing_store_is_left_alone(finished, create):
    with pytest.raises(ResumeError, match="out.zarr: exists; .*--resume .*--overwrite .*--out"):
        create(PLAN)
    assert finished.complete


def test_overwrite_replaces_a_store(finished, create, read):
    sink = create(PLAN, overwrite=True)
    assert list(sink.missing()) == list(PLAN.writes())
    assert not sink.complete
    assert not list(finished.path.parent.glob("*.part"))


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_store_is_never_deleted(create, path, overwrite):
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(ResumeError):
        create(PLAN, overwrite=overwrite)
    assert (path / "thesis.txt").read_text() == "years of work"


def test_a_file_is_never_deleted(create, path):
    path.write_text("years of work")
    with pytest.raises(ResumeError, match="not a Zarr store"):
        create(PLAN, overwrite=True)
    assert path.read_text() == "years of work"


def test_a_link_to_a_store_is_not_followed_to_delete_it(finished, tmp_path):
    link = tmp_path / "link.zarr"
    link.symlink_to(finished.path)
    with pytest.raises(ResumeError):
        ZarrSink.create(link, PLAN, {}, overwrite=True)
    assert finished.complete
    assert (finished.path / "0/c/0/0/0").exists()


def test_an_empty_folder_may_be_overwritten(create, path):
    path.mkdir()
    assert not create(PLAN, overwrite=True).complete


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        ZarrSink.create(tmp_path / "file" / "out.zarr", PLAN, {})


def test_resume_refuses_another_plan_and_names_the_difference(create, path):
    create(PLAN)
    other = dataclasses.replace(PLAN, seed=99, precision="bf16")
    with pytest.raises(ResumeError, match="another plan .*seed: 1 there, 99 here.*precision") as caught:
        ZarrSink.resume(path, other)
    assert "--overwrite" in str(caught.value)
    assert stored_plan(path)["seed"] == 1


def not_a_store(path):
    path.mkdir()
    (path / "thesis.txt").write_text("")


def somebody_elses(path):
    zarr.open_group(path, mode="w", zarr_format=3).attrs["ome"] = {"version": "0.5"}


def an_array(path):
    zarr.create_array(path, shape=(4,), chunks=(2,), dtype="u1")


def damaged(path):
    path.mkdir()
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_ty')


def empty_json(path):
    path.mkdir()
    (path / "zarr.json").write_text("{}")


def other_attribute(path):
    zarr.open_group(path, mode="w", zarr_format=3).attrs["ourgan"] = "yes"


def without_plan(path):
    zarr.open_group(path, mode="w", zarr_format=3).attrs["ourgan"] = {"complete": True}


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        not_a_store,
        somebody_elses,
        an_array,
        damaged,
        empty_json,
        other_attribute,
        without_plan,
        lambda path: path.write_text("{}"),
    ],
)
def test_resume_refuses_what_is_no_store_of_ours(path, make):
    make(path)
    assert stored_plan(path) is None
    with pytest.raises(ResumeError, match="not a store of this engine"):
        ZarrSink.resume(path, PLAN)


@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_resume_refuses_a_store_with_a_damaged_array(create, reopen, path, content):
    create(PLAN)
    (path / "1" / "zarr.json").unlink()
    if content is not None:
        (path / "1" / "zarr.json").write_text(content)
    with pytest.raises(ResumeError, match="damaged, .*--overwrite"):
        reopen(PLAN)


def test_errors_are_one_line(create, path):
    create(PLAN)
    with pytest.raises(EngineError) as caught:
        ZarrSink.resume(path, plan_of((60, 60)))
    assert "\n" not in str(caught.value)


# Others read it


@pytest.mark.parametrize("name", PLANS)
def test_tensorstore_reads_the_same_bits(create, name):
    plan = PLANS[name]
    sink, pixels = create(plan), pixels_of(plan)
    write_all(sink, pixels)
    sink.finish()
    for level in range(len(plan.pyramid)):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(sink.path / str(level))}}
        array = tensorstore.open(spec, open=True).result()
        assert array.domain.labels == ("c", "y", "x")
        np.testing.assert_array_equal(array.read().result(), pixels)
        pixels = mean_of_four(pixels)


@pytest.mark.parametrize("name", PLANS)
def test_metadata_is_valid_ome_zarr(create, name):
    plan = PLANS[name]
    image = Image.from_zarr(zarr.open_group(create(plan).path, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert multiscale.name == "out"
    assert [axis.name for axis in multiscale.axes] == ["c", "y", "x"]
    assert [axis.type for axis in multiscale.axes] == ["channel", "space", "space"]
    assert [dataset.path for dataset in multiscale.datasets] == [str(i) for i in range(len(plan.pyramid))]
    assert [channel["color"] for channel in image.ome_attributes.omero["channels"]] == ["FF0000", "00FF00", "0000FF"]


def test_levels_lie_where_their_pixels_are(create):
    """A region says where it is; a pixel of level i sits at the centre of the 2**i x 2**i pixels that it averages."""
    plan = PLANS["a region"]
    image = Image.from_zarr(zarr.open_group(create(plan).path, mode="r"))
    for level, dataset in enumerate(image.ome_attributes.multiscales[0].datasets):
        scale, translation = dataset.coordinateTransformations
        assert list(scale.scale) == [1, 2**level, 2**level]
        centre = sum(range(2**level)) / 2**level
        assert list(translation.translation) == [0, plan.roi.y0 + centre, plan.roi.x0 + centre]


def test_provenance_and_plan_are_in_the_store(create, path):
    create(PLAN)
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]["ourgan"]
    assert attributes == {"complete": False, "plan": PLAN.to_json(), "licences": ["CC0-1.0: test"]}
