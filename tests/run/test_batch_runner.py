"""Lanes: tiles in batches have the bits of tiles one by one, out of buffers that are made once; what fails is said at once."""

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
from engine.io.zarr_store import ZarrSink
from engine.plan.limits import IN_FLIGHT
from engine.run import batched as stream
from engine.run.stage import Stage

HALO = 8


@pytest.fixture(scope="module")
def network():
    return small_network()


def streamed(chain, sink):
    return list(chain.render(sink))


def reference(folder, *arguments, **options):
    chain = Chain(folder, *arguments, **options)
    sink = Sink(chain.plan)
    list(chain.render(sink))
    return chain, sink.pixels


@pytest.fixture(scope="module")
def twelve(tmp_path_factory, network, picture):
    """What makes 12 tiles of one stage (48 x 48 with the halo), and their pixels."""
    arguments = (network, picture(90, 120), [32], HALO)
    chain, pixels = reference(tmp_path_factory.mktemp("serial"), *arguments, sigma=0.05)
    assert len(chain.ran) == 12
    assert pixels.std() > 10
    return arguments, pixels


@pytest.fixture
def one_stage(tmp_path, twelve):
    """(options -> a chain of lanes, the pixels that it should make)."""
    arguments, pixels = twelve
    return lambda **options: Chain(tmp_path, *arguments, **({"batches": [1], "sigma": 0.05} | options)), pixels


@pytest.mark.parametrize("batch", [1, 5, 12, 40])
def test_a_batch_has_the_bits_of_its_tiles(one_stage, batch):
    """5: the last batch has two tiles and three that are dropped; 40: there is no full batch."""
    make, expected = one_stage
    chain = make(batches=[batch])
    sink = Sink(chain.plan)
    done = streamed(chain, sink)
    np.testing.assert_array_equal(sink.pixels, expected)
    assert sorted(d.box for d in done) == sorted(chain.plan.writes())
    assert chain.ran == [0] * 12
    assert min(min(d.compute_seconds, d.write_seconds) for d in done) >= 0


@pytest.mark.parametrize("roi", [None, Box(40, 100, 500, 600)], ids=["whole", "region"])
def test_a_chain_has_the_bits_of_a_chain_one_by_one(tmp_path, network, picture, roi):
    """Inner tiles go through the cache; a region's shards take parts of tiles."""
    arguments = (network, picture(40, 44), [24, 64], HALO)
    chain, expected = reference(tmp_path / "serial", *arguments, roi=roi)
    other = Chain(tmp_path / "batched", *arguments, roi=roi, batches=[3, 4])
    sink = Sink(other.plan)
    streamed(other, sink)
    np.testing.assert_array_equal(sink.pixels, expected)
    assert sorted(other.ran) == sorted(chain.ran)


def test_nothing_new_is_made_once_it_runs(one_stage, monkeypatch):
    """Every input, output and pixel on its way out lies where it lay in the first round of the slots."""
    make, _ = one_stage
    chain = make(batches=[2])
    inputs, outputs, fresh = set(), [], []
    place, fill, record = chain.image.gather_input, Stage.fill, stream.BatchRunner.capture

    def placed(block, tile, out=None):
        inputs.add((block.data_ptr(), out.data_ptr()))
        return place(block, tile, out)

    def filled(stage, out, tiles, chunks):
        outputs.append((out.data_ptr(), tiles.data_ptr()))
        fill(stage, out, tiles, chunks)

    class Watched(Sink):
        def write(self, box, pixels):
            hosts.add(pixels.__array_interface__["data"][0])
            super().write(box, pixels)

    def recorded(runner):
        record(runner)
        monkeypatch.setattr(stream.OutputBuffer, "__init__", lambda *_: fresh.append("slot"))

    hosts = set()
    monkeypatch.setattr(chain.image, "gather_input", placed)
    monkeypatch.setattr(Stage, "fill", filled)
    monkeypatch.setattr(stream.BatchRunner, "capture", recorded)
    streamed(chain, Watched(chain.plan))
    assert len(inputs) == 2
    assert len(set(outputs)) == 1
    assert len(outputs) == 1 + 6  # the warming up and 12 tiles
    assert len(hosts) <= 2 * (IN_FLIGHT + 1)
    assert fresh == []


def test_slow_writes_keep_their_pixels_and_hold_the_device_back(one_stage):
    make, expected = one_stage
    gate = threading.Event()
    chain = make(batches=[2])
    sink = Sink(chain.plan, gate=gate)
    thread = threading.Thread(target=streamed, args=(chain, sink))
    thread.start()
    time.sleep(1.0)
    # Nobody has written yet: all slots are full and the next batch waits for one.
    assert sink.boxes == []
    assert len(chain.ran) <= 2 * (IN_FLIGHT + 1)
    gate.set()
    thread.join(200)
    np.testing.assert_array_equal(sink.pixels, expected)


@pytest.mark.parametrize("roi", [None, Box(0, 0, 359, 480)])
@pytest.mark.parametrize("fails", [1, 4, 12])
def test_a_write_that_fails_ends_the_render(one_stage, fails, roi):
    make, _ = one_stage
    chain = make(batches=[2], roi=roi)
    with pytest.raises(OSError, match="No space left"):
        streamed(chain, Sink(chain.plan, fails=fails, seconds=0.01))
    assert len(chain.ran) <= 2 * (fails + IN_FLIGHT + 1)


def test_a_render_that_is_stopped_ends_its_threads_and_can_go_on(one_stage):
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
    rest = streamed(make(batches=[2]), sink)
    assert len(rest) == 12 - len(before)
    np.testing.assert_array_equal(sink.pixels, expected)


def test_two_writers_make_the_pyramid_of_one(tmp_path):
    """Whoever writes the last of four shards makes their parent: at worst both do, and it is the same."""
    plan = plan_of((512, 640), cores=(16, 16), halos=(8, 4))
    image = torch.randint(0, 256, (3, *plan.size), dtype=torch.uint8)
    found = []
    for name in ("serial", "a", "b", "c"):
        sink = ZarrSink.create(tmp_path / name / "out.zarr", plan, {})
        boxes = list(plan.writes())
        if name == "serial":
            for box in boxes:
                sink.write(box, image[(slice(None), *box.slices)].numpy())
        else:
            with stream.Writers(sink) as writers:
                for box in boxes:
                    writers.submit(box, image[(slice(None), *box.slices)])
                assert [d.box for d in writers.finished(0)] == boxes
        assert list(sink.missing()) == []
        found.append(files(tmp_path / name))
    assert all(f == found[0] for f in found)
    assert len(plan.pyramid) > 1


# Half precision that overflows


@pytest.fixture
def bright(picture):
    """Dark but for one spot, which lies in one tile of 32 and no halo of 8."""
    image = picture(64, 96) * 0.01
    image[:, 46:50, 46:50] = 100.0
    return image


def half_stage(gain, full_gain=None):
    return Stage(small_network(gain), CPU, "fp16", lambda: small_network(gain if full_gain is None else full_gain))


@pytest.mark.parametrize("batches", [None, [4]], ids=["one by one", "lanes"])
def test_a_tile_that_overflows_is_redone_in_float32_alone(tmp_path, bright, batches):
    gain = 2e4
    results = {}
    for name, stage in {"half": half_stage(gain), "full": Stage(small_network(gain), CPU, "fp32")}.items():
        chain = Chain(tmp_path / name, None, bright, [32], HALO, batches, stages=[stage])
        sink = Sink(chain.plan)
        streamed(chain, sink)
        results[name] = chain.image.redone, sink.pixels
    assert results["half"][0] == 1
    assert results["full"][0] == 0
    half, full = results["half"][1], results["full"][1]
    np.testing.assert_array_equal(half[:, 128:256, 128:256], full[:, 128:256, 128:256])
    assert (half != full).any()  # the others stayed in half precision
    assert np.abs(half.astype(int) - full).max() <= 2


@pytest.mark.parametrize("batches", [None, [4]], ids=["one by one", "lanes"])
def test_what_float32_cannot_make_is_refused(tmp_path, bright, batches):
    chain = Chain(tmp_path, None, bright, [32], HALO, batches, stages=[half_stage(2e4, full_gain=1e38)])
    sink = Sink(chain.plan)
    with pytest.raises(
        RenderError, match=r"step 2: \d+ NaN or infinite values in tile \(row 1, column 1\), in fp32 too; .*weights"
    ):
        streamed(chain, sink)
    assert Box(128, 128, 256, 256) not in sink.boxes


# Memory that runs out


@pytest.fixture
def memory(monkeypatch):
    """memory(limit): a device that holds so many LR pixels of a batch, as an error of PyTorch's allocator."""
    fill, seen = Stage.fill, []

    def limited(limit, after=0):
        def filled(stage, out, tiles, chunks):
            pixels = tiles.shape[0] * tiles.shape[2] * tiles.shape[3] // chunks
            seen.append((tiles.shape[0], chunks))
            if len(seen) > after and pixels > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")
            fill(stage, out, tiles, chunks)

        monkeypatch.setattr(Stage, "fill", filled)
        return seen

    return limited


@pytest.mark.parametrize(
    ("limit", "expected"), [(8 * 2304, (8, 1)), (4 * 2304, (4, 1)), (2304, (1, 1)), (700, (1, 4))], ids=str
)
def test_less_memory_means_smaller_batches_and_more_pieces_and_the_same_bits(one_stage, memory, limit, expected):
    make, pixels = one_stage
    seen = memory(limit)
    chain = make(batches=[8])
    sink = Sink(chain.plan)
    streamed(chain, sink)
    assert seen[-1] == (chain.runners[0].batch, chain.runners[0].tail_chunks) == expected
    np.testing.assert_array_equal(sink.pixels, pixels)


def test_memory_that_runs_out_on_the_way_keeps_what_is_written(one_stage, memory):
    make, pixels = one_stage
    memory(2304, after=4)
    chain = make(batches=[2])
    sink = Sink(chain.plan)
    done = streamed(chain, sink)
    assert chain.runners[0].batch == 1
    assert len(done) == len(set(sink.boxes)) == sink.begun == 12
    np.testing.assert_array_equal(sink.pixels, pixels)


def test_memory_that_never_suffices_names_the_stage(tmp_path, network, picture, memory):
    chain = Chain(tmp_path, network, picture(56, 60), [40, 64], HALO, batches=[1, 2])
    memory(10)
    with pytest.raises(stream.OutOfDeviceMemory, match=r"^CUDA out of memory. Tried to allocate 20.00 MiB.$") as caught:
        streamed(chain, Sink(chain.plan))
    assert caught.value.position == 0
    assert [runner.tail_chunks for runner in chain.runners] == [64, 64]
