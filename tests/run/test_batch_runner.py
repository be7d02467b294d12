"""Batches have the bits of single tiles and run in buffers that are made once; errors are raised at once."""

import threading
import time

import numpy as np
import pytest
import torch
from support.chains import CPU, Chain, Sink, small_network
from support.plans import plan_of
from support.stores import files

from engine.errors import RenderError
from engine.geometry import Box
from engine.io.pyramid_writer import PyramidWriter
from engine.io.zarr_store import ZarrSink
from engine.plan.limits import IN_FLIGHT
from engine.run import batched
from engine.run.stage import Stage

HALO = 8


@pytest.fixture(scope="module")
def network():
    return small_network()


def rendered(chain, **options):
    """The sink after a whole render; ``options`` are those of ``Sink``."""
    sink = Sink(chain.plan, **options)
    list(chain.render(sink))
    return sink


@pytest.fixture(scope="module")
def twelve(tmp_path_factory, network, picture):
    """Arguments of a chain of one stage with 12 tiles (48 x 48 with the halo), and its pixels."""
    arguments = (network, picture(90, 120), [32], HALO)
    chain = Chain(tmp_path_factory.mktemp("serial"), *arguments, sigma=0.05)
    pixels = rendered(chain).pixels
    assert len(chain.ran) == 12
    assert pixels.std() > 10
    return arguments, pixels


@pytest.fixture
def one_stage(tmp_path, twelve):
    """(function of options -> a batched chain, its expected pixels)."""
    arguments, pixels = twelve
    return lambda **options: Chain(tmp_path, *arguments, **({"batches": [1], "sigma": 0.05} | options)), pixels


def test_batch_has_the_bits_of_its_tiles(one_stage):
    """5: the last batch has two tiles and three that are dropped; 40: there is no full batch."""
    make, expected = one_stage
    for batch in (1, 5, 12, 40):
        chain = make(batches=[batch])
        sink = Sink(chain.plan)
        writes = list(chain.render(sink))
        np.testing.assert_array_equal(sink.pixels, expected)
        assert sorted(w.box for w in writes) == sorted(chain.plan.writes())
        assert chain.ran == [0] * 12
        assert min(min(w.compute_seconds, w.write_seconds) for w in writes) >= 0


def test_chain_has_the_bits_of_the_serial_chain(tmp_path, network, picture):
    """Inner tiles go through the cache; shards of a region take parts of tiles."""
    arguments = (network, picture(50, 54), [24, 64], HALO)
    for name, roi in (("whole", None), ("region", Box(40, 100, 500, 600))):
        chain = Chain(tmp_path / f"serial {name}", *arguments, roi=roi)
        expected = rendered(chain).pixels
        other = Chain(tmp_path / f"batched {name}", *arguments, roi=roi, batches=[3, 4])
        np.testing.assert_array_equal(rendered(other).pixels, expected)
        assert sorted(other.ran) == sorted(chain.ran)


def test_buffers_are_made_once(one_stage, monkeypatch):
    """Every input, output and pixel buffer keeps its address from the first round on."""
    make, _ = one_stage
    chain = make(batches=[2])
    inputs, outputs, hosts, late_buffers = set(), [], set(), []
    gather_input, fill, capture = chain.image.gather_input, Stage.fill, batched.BatchRunner.capture

    def watched_gather(pixels, tile, out=None):
        inputs.add((pixels.data_ptr(), out.data_ptr()))
        return gather_input(pixels, tile, out)

    def watched_fill(stage, out, tiles, chunks):
        outputs.append((out.data_ptr(), tiles.data_ptr()))
        fill(stage, out, tiles, chunks)

    class WatchedSink(Sink):
        def write(self, box, pixels, half=None):
            hosts.add(pixels.__array_interface__["data"][0])
            super().write(box, pixels)

    def watched_capture(runner):
        capture(runner)
        monkeypatch.setattr(batched.OutputBuffer, "__init__", lambda *_: late_buffers.append("buffer"))

    monkeypatch.setattr(chain.image, "gather_input", watched_gather)
    monkeypatch.setattr(Stage, "fill", watched_fill)
    monkeypatch.setattr(batched.BatchRunner, "capture", watched_capture)
    list(chain.render(WatchedSink(chain.plan)))
    assert len(inputs) == 2
    assert len(set(outputs)) == 1
    assert len(outputs) == 1 + 6  # the warm-up and 12 tiles
    assert len(hosts) <= 2 * (IN_FLIGHT + 1)
    assert late_buffers == []


def test_slow_writes_keep_their_pixels_and_block_the_device(one_stage):
    make, expected = one_stage
    gate = threading.Event()
    chain = make(batches=[2])
    sink = Sink(chain.plan, gate=gate)
    thread = threading.Thread(target=lambda: list(chain.render(sink)))
    thread.start()
    time.sleep(1.0)
    # No write has ended: all buffers are full and the next batch waits for one.
    assert sink.boxes == []
    assert len(chain.ran) <= 2 * (IN_FLIGHT + 1)
    gate.set()
    thread.join(200)
    np.testing.assert_array_equal(sink.pixels, expected)


def test_failed_write_ends_the_render(one_stage):
    make, _ = one_stage
    for roi in (None, Box(0, 0, 359, 480)):
        for fails in (1, 4, 12):
            chain = make(batches=[2], roi=roi)
            with pytest.raises(OSError, match="No space left"):
                rendered(chain, fails=fails, seconds=0.01)
            assert len(chain.ran) <= 2 * (fails + IN_FLIGHT + 1), (roi, fails)


def test_stopped_render_ends_its_threads_and_is_continued(one_stage):
    make, expected = one_stage
    chain = make(batches=[2])
    sink = Sink(chain.plan, seconds=0.02)
    run = chain.render(sink)
    for _ in range(3):
        next(run)
    run.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("write")]
    before = list(sink.boxes)
    assert 3 <= len(before) < 12
    rest = list(make(batches=[2]).render(sink))
    assert len(rest) == 12 - len(before)
    np.testing.assert_array_equal(sink.pixels, expected)


def test_two_writers_make_the_pyramid_of_one(tmp_path, monkeypatch):
    """The writer that ends last of four shards makes their parent, alone."""
    written, write_shard = [], PyramidWriter._write_shard
    monkeypatch.setattr(
        PyramidWriter, "_write_shard", lambda own, *shard: written.append(shard[:2]) or write_shard(own, *shard)
    )
    plan = plan_of((512, 640), cores=(16, 16), halos=(8, 4))
    image = torch.randint(0, 256, (3, *plan.size), dtype=torch.uint8)
    stores = []
    for name in ("serial", "a", "b", "c"):
        written.clear()
        sink = ZarrSink.create(tmp_path / name / "out.zarr", plan, {})
        boxes = list(plan.writes())
        if name == "serial":
            for box in boxes:
                sink.write(box, image[(slice(None), *box.slices)].numpy())
        else:
            with batched.Writers(sink, 2) as writers:
                for box in boxes:
                    writers.submit(box, image[(slice(None), *box.slices)])
                assert [w.box for w in writers.finished(0)] == boxes
        assert list(sink.missing()) == []
        sink.finish()
        assert sorted(written) == [(level, i) for level in range(len(plan.pyramid)) for i in plan.grid(level).indices()]
        stores.append(files(tmp_path / name))
    assert all(store == stores[0] for store in stores)
    assert len(plan.pyramid) > 1


# Half precision that overflows


@pytest.fixture
def bright(picture):
    """Dark but for one spot, which lies in one tile of 32 and in no halo of 8."""
    image = picture(64, 96) * 0.01
    image[:, 46:50, 46:50] = 100.0
    return image


def half_stage(gain, full_gain=None):
    return Stage(small_network(gain), CPU, "fp16", lambda: small_network(gain if full_gain is None else full_gain))


def test_overflowing_tile_is_redone_in_float32(tmp_path, bright):
    """Only that tile is computed again: the others stay in half precision."""
    gain = 2e4
    for batches in (None, [4]):
        results = {}
        for name, stage in {"half": half_stage(gain), "full": Stage(small_network(gain), CPU, "fp32")}.items():
            chain = Chain(tmp_path / f"{name} {batches}", None, bright, [32], HALO, batches=batches, stages=[stage])
            results[name] = rendered(chain).pixels
            assert chain.image.redone == (name == "half")
        half, full = results["half"], results["full"]
        np.testing.assert_array_equal(half[:, 128:256, 128:256], full[:, 128:256, 128:256])
        assert (half != full).any()
        assert np.abs(half.astype(int) - full).max() <= 2


def test_tile_that_overflows_in_float32_is_not_written(tmp_path, bright):
    words = r"step 2: \d+ NaN or infinite values in tile \(row 1, column 1\), in fp32 too; .*weights"
    for batches in (None, [4]):
        stage = half_stage(2e4, full_gain=1e38)
        chain = Chain(tmp_path / str(batches), None, bright, [32], HALO, batches=batches, stages=[stage])
        sink = Sink(chain.plan)
        with pytest.raises(RenderError, match=words):
            list(chain.render(sink))
        assert Box(128, 128, 256, 256) not in sink.boxes


# Exhausted memory


@pytest.fixture
def memory(monkeypatch):
    """Function ``memory(limit)``: a device that holds ``limit`` LR pixels of a batch, with PyTorch's allocator error.

    Returns a list of (images, chunks) of every run.
    """
    fill = Stage.fill

    def limited(limit, after=0):
        runs = []

        def limited_fill(stage, out, tiles, chunks):
            pixels = tiles.shape[0] * tiles.shape[2] * tiles.shape[3] // chunks
            runs.append((tiles.shape[0], chunks))
            if len(runs) > after and pixels > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")
            fill(stage, out, tiles, chunks)

        monkeypatch.setattr(Stage, "fill", limited_fill)
        return runs

    return limited


def test_less_memory_gives_smaller_batches_and_the_same_bits(one_stage, memory):
    make, pixels = one_stage
    for limit, expected in ((8 * 2304, (8, 1)), (4 * 2304, (4, 1)), (2304, (1, 1)), (700, (1, 4))):
        runs = memory(limit)
        chain = make(batches=[8])
        np.testing.assert_array_equal(rendered(chain).pixels, pixels)
        assert runs[-1] == (chain.runners[0].batch, chain.runners[0].tail_chunks) == expected


def test_memory_exhausted_midway_keeps_written_boxes(one_stage, memory):
    make, pixels = one_stage
    memory(2304, after=4)
    chain = make(batches=[2])
    sink = Sink(chain.plan)
    writes = list(chain.render(sink))
    assert chain.runners[0].batch == 1
    assert len(writes) == len(set(sink.boxes)) == sink.begun == 12
    np.testing.assert_array_equal(sink.pixels, pixels)


def test_insufficient_memory_names_the_stage(tmp_path, network, picture, memory):
    chain = Chain(tmp_path, network, picture(56, 60), [40, 64], HALO, batches=[1, 2])
    memory(10)
    words = r"^CUDA out of memory. Tried to allocate 20.00 MiB.$"
    with pytest.raises(batched.OutOfDeviceMemory, match=words) as caught:
        rendered(chain)
    assert caught.value.position == 0
    assert [runner.tail_chunks for runner in chain.runners] == [64, 64]
