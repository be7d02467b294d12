"""Inner bands of a stream: launches that can be captured and replayed, in memory that is already allocated."""

import resource
import statistics
import sys

import pytest
import torch
from support.devices import needs_gpu
from support.networks import NETWORKS, lively, rrdb, swinir
from support.streams import plan, pour, stream, whole
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.archs.esrgan import RRDBNet
from engine.bands.stream import RowStream
from engine.device.heap import fix_malloc_thresholds
from engine.device.queue import WARM_UPS, DeviceQueue, full_float32
from engine.run.stage import Stage

CPU = torch.device("cpu")


def storages(values):
    return {v.untyped_storage()._cdata for v in tree_leaves(values) if isinstance(v, torch.Tensor)}


class Launches(TorchDispatchMode):
    """Operations on tensors with the memory that they read and write, as a CUDA graph records them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @property
    def names(self):
        return {func._schema.name for func, *_ in self.calls}

    def replay(self):
        """Run the same operations on the same memory, without the Python code between them."""
        for func, args, kwargs, result in self.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not storages(result) & storages((args, kwargs)):  # else a view, whose memory is unchanged
                result.copy_(func(*args, **kwargs))


class CapturingQueue(DeviceQueue):
    """A CPU queue that captures launches like CUDA's; a capture runs when it is first replayed."""

    def __init__(self, device):
        super().__init__(device)
        self.captures, self.replays = [], 0

    def capture(self, work):
        launches = Launches()
        self.captures.append(launches)

        def replay():
            self.replays += 1
            if launches.calls:
                launches.replay()
            else:
                with launches:
                    work()

        return replay


def capturing_stream(monkeypatch, *arguments):
    """(stream, its capturing queue)."""
    queue = CapturingQueue(CPU)
    with monkeypatch.context() as patch:
        patch.setattr("engine.bands.stream.device_queue", lambda device: queue)
        return stream(*arguments), queue


@pytest.mark.parametrize("make", [rrdb, swinir, lambda: rrdb().to_inference(torch.bfloat16), *NETWORKS])
def test_replayed_bands_are_bit_equal(picture, monkeypatch, make):
    network, image = lively(make()), picture(96, 12)
    rows, queue = capturing_stream(monkeypatch, network, 4, 12, 2)
    assert torch.equal(pour(rows, image), pour(stream(network, 4, 12, 2), image))
    segments = len(rows.plan.segments)
    assert len(queue.captures) == segments
    # The next picture replays the captures from its first inner band on.
    replays, queue.replays = queue.replays, 0
    assert torch.equal(pour(rows, image[:, 8:]), pour(stream(network, 4, 12, 2), image[:, 8:]))
    assert replays - segments * 3 < queue.replays < replays + segments * WARM_UPS
    assert len(queue.captures) == segments


@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_bands_neither_concatenate_nor_synchronize(picture, monkeypatch, make):
    """Reading a number from the device would synchronize with it, which a CUDA graph forbids."""
    rows, queue = capturing_stream(monkeypatch, lively(make()), 4, 12, 2)
    pour(rows, picture(96, 12))
    names = set().union(*(launches.names for launches in queue.captures))
    assert names & {"aten::convolution", "aten::conv2d"}
    assert not names & {"aten::cat", "aten::_local_scalar_dense", "aten::item", "aten::nonzero"}


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of Linux")
def test_inner_bands_reuse_freed_pages(picture):
    """Temporaries, thousands of pages per band, lie in pages that earlier bands freed: there are hardly any page faults."""
    fix_malloc_thresholds()
    stage = Stage(RRDBNet(blocks=1).eval(), CPU, "fp32")
    rows = RowStream(stage.stream_plan(256))
    band = picture(rows.plan.band, 256)[None].contiguous(memory_format=torch.channels_last)
    rows.start(0, 10**6)
    faults = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in stage.push(rows, band):
            pass
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # Thousands in every band if the heap is trimmed between bands; a single band may meet what other threads free or map.
    assert statistics.median(faults[-6:]) < 20


@needs_gpu
@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_replayed_bands_on_a_gpu_equal_whole_image(picture, make):
    network, image = lively(make()).to("cuda"), picture(96, 12).to("cuda")
    rows = RowStream(plan(network, 4, 12, 2), "cuda")
    with full_float32():
        for part in (image, image[:, 8:]):
            expected = whole(network, part)
            difference = (pour(rows, part) - expected).abs().max()
            assert float(difference) <= 1e-4 * float(expected.max() - expected.min())
    assert all(segment._replay is not None for segment in rows._arenas[0]._streams.values())
