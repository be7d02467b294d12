"""Away from a picture's ends a band is one piece of work: launches that can be recorded, in memory that is already there."""

import resource
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
    """Every operation on tensors, with the memory that it read and wrote, as a CUDA graph keeps them."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.done.append((func, args, kwargs or {}, result))
        return result

    @property
    def names(self):
        return {func._schema.name for func, *_ in self.done}

    def repeat(self):
        """The same operations on the same memory. Nothing of the program between them runs."""
        for func, args, kwargs, result in self.done:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not storages(result) & storages((args, kwargs)):  # else a view, which is still where it was
                result.copy_(func(*args, **kwargs))


class Recording(DeviceQueue):
    """A CPU's queue that records, as CUDA's does; what is recorded runs at its first repetition."""

    def __init__(self, device):
        super().__init__(device)
        self.recorded, self.repeated = [], 0

    def capture(self, work):
        launches = Launches()
        self.recorded.append(launches)

        def repeat():
            self.repeated += 1
            if launches.done:
                launches.repeat()
            else:
                with launches:
                    work()

        return repeat


def recorded(monkeypatch, *arguments):
    """A stream whose queue records, and that queue."""
    queues = []
    with monkeypatch.context() as patch:
        patch.setattr("engine.bands.stream.device_queue", lambda device: queues.append(Recording(device)) or queues[-1])
        return stream(*arguments), queues[0]


@pytest.mark.parametrize("make", [rrdb, swinir, lambda: rrdb().to_mixed(torch.bfloat16), *NETWORKS])
def test_recorded_launches_give_the_bits_of_the_program(picture, monkeypatch, make):
    network, image = lively(make()), picture(96, 12)
    rows, queue = recorded(monkeypatch, network, 4, 12, 2)
    assert torch.equal(pour(rows, image), pour(stream(network, 4, 12, 2), image))
    segments = len(rows.plan.segments)
    assert len(queue.recorded) == segments
    # What was recorded in one picture serves the next, from its first band away from the border on.
    repeated, queue.repeated = queue.repeated, 0
    assert torch.equal(pour(rows, image[:, 8:]), pour(stream(network, 4, 12, 2), image[:, 8:]))
    assert repeated - segments * 3 < queue.repeated < repeated + segments * WARM_UPS
    assert len(queue.recorded) == segments


@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_nothing_is_concatenated_and_nothing_waits_for_a_value(picture, monkeypatch, make):
    """A number that the program asks for would stop the device, and cannot be recorded."""
    rows, queue = recorded(monkeypatch, lively(make()), 4, 12, 2)
    pour(rows, picture(96, 12))
    names = set().union(*(launches.names for launches in queue.recorded))
    assert names & {"aten::convolution", "aten::conv2d"}
    assert not names & {"aten::cat", "aten::_local_scalar_dense", "aten::item", "aten::nonzero"}


@pytest.mark.skipif(sys.platform != "linux", reason="counts what the kernel of Linux gives out")
def test_an_inner_band_takes_no_memory_from_the_system(picture):
    """By page faults: what operations make on the way, thousands of pages a band, lies where the band before had its own."""
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
    assert max(faults[-4:]) < 20  # thousands when the heap is given back in between


@needs_gpu
@pytest.mark.parametrize("make", [rrdb, swinir, *NETWORKS])
def test_recorded_launches_on_a_gpu_give_the_whole_image(picture, make):
    network, image = lively(make()).to("cuda"), picture(96, 12).to("cuda")
    rows = RowStream(plan(network, 4, 12, 2), "cuda")
    with full_float32():
        for part in (image, image[:, 8:]):
            expected = whole(network, part)
            difference = (pour(rows, part) - expected).abs().max()
            assert float(difference) <= 1e-4 * float(expected.max() - expected.min())
    assert all(segment._replay is not None for segment in rows._segments)
