"""The pretend accelerator itself: it refuses what CUDA refuses, and shows what CUDA would hide until it fails."""

import gc

import pytest
import torch
from support.accelerator import GIB, MIB, TYPE, AcceleratorError, pretend_accelerator

FIRST, SECOND = (torch.device(TYPE, index) for index in (0, 1))


@pytest.fixture
def accelerator():
    with pretend_accelerator() as board:
        yield board


@pytest.fixture
def cuda(accelerator):
    return torch.get_device_module(FIRST)


MISTAKES = {
    "operands of two devices": lambda x: x + torch.ones(4, device=SECOND),
    "an operand left on the host": lambda x: x + torch.ones(4),
    "a network left on the host": lambda x: torch.nn.Linear(4, 4)(x),
    "a gradient across devices": lambda x: torch.zeros(4).index_add_(0, torch.arange(4), x),
    "a concatenation across devices": lambda x: torch.cat([x, torch.ones(4)]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_devices_do_not_mix(accelerator, name):
    with pytest.raises(RuntimeError, match="on the same device, but found at least two devices"):
        MISTAKES[name](torch.ones(4, device=FIRST))


def test_numbers_and_copies_mix(accelerator):
    x = torch.ones(4, device=FIRST)
    assert (x * 2 + torch.tensor(1.0)).tolist() == [3.0] * 4
    assert x.to(SECOND).device == SECOND
    assert x[torch.tensor([0, 1])].tolist() == [1.0] * 2
    with pytest.raises(TypeError, match="can't convert"):
        x.numpy()


def test_a_device_without_an_index_is_refused_where_pytorch_refuses_it(accelerator, cuda):
    assert torch.zeros(1, device=TYPE).device == FIRST
    for function in (
        lambda: cuda.set_per_process_memory_fraction(0.5, torch.device(TYPE)),
        lambda: cuda.set_device(TYPE),
    ):
        with pytest.raises(ValueError, match="with a specified index"):
            function()


def test_views_share_memory_and_gradients_flow(accelerator):
    x = torch.zeros(4, 4, device=FIRST)
    x[1:3].view(2, 2, 2).permute(2, 0, 1).add_(1)
    assert x.sum().item() == 8
    weight = torch.ones(3, device=SECOND, requires_grad=True)
    (weight.square() * 3).sum().backward()
    assert weight.grad.device == SECOND
    assert weight.grad.tolist() == [6.0] * 3


def test_new_memory_holds_garbage(accelerator):
    assert torch.empty(3, device=FIRST).isnan().all().item()


# Synchronisation


WAITS = {
    "a number": lambda x: float(x[0]),
    "a copy to the host": lambda x: x.cpu(),
    "a copy to pageable memory": lambda x: torch.empty(4).copy_(x, non_blocking=True),
    "a copy from pageable memory": lambda x: x.copy_(torch.ones(4), non_blocking=True),
    "a new tensor of a list": lambda x: torch.tensor([1.0, 2.0], device=FIRST),
    "a mask": lambda x: x[x > 0],
    "a condition": lambda x: bool((x > 0).all()),
}


@pytest.mark.parametrize("name", WAITS)
def test_waiting_for_the_device_can_be_forbidden(accelerator, name):
    x = torch.ones(4, device=FIRST)
    WAITS[name](x)
    with accelerator.forbid_synchronization(), pytest.raises(AcceleratorError, match="synchronizes"):
        WAITS[name](x)


def test_pinned_memory_is_filled_when_the_host_waits(accelerator, cuda):
    host, event = torch.empty(4, pin_memory=True), cuda.Event()
    host.copy_(torch.ones(4, device=FIRST), non_blocking=True)
    event.record()
    assert host.isnan().all()
    event.synchronize()
    assert host.tolist() == [1.0] * 4


def test_part_of_pinned_memory_is_filled_when_the_host_waits(accelerator, cuda):
    host = torch.zeros(8, dtype=torch.uint8).pin_memory()
    host[2:6].copy_(torch.arange(4, dtype=torch.uint8, device=FIRST), non_blocking=True)
    assert host.tolist() == [0, 0, 255, 255, 255, 255, 0, 0]
    cuda.synchronize()
    assert host.tolist() == [0, 0, 0, 1, 2, 3, 0, 0]


def test_pinned_memory_stays_until_its_copy_has_ended(accelerator, cuda):
    host = torch.empty(4, pin_memory=True).fill_(1)
    x = torch.empty(4, device=FIRST)
    x.copy_(host, non_blocking=True)
    host.fill_(2)
    with pytest.raises(AcceleratorError, match="changed before its copy"):
        cuda.synchronize()


def test_streams_are_ordered_by_events(accelerator, cuda):
    x, other = torch.ones(4, device=FIRST), cuda.Stream(FIRST)
    with cuda.stream(other), pytest.raises(AcceleratorError, match="has to wait"):
        x + 1
    other.wait_stream(cuda.current_stream())
    with cuda.stream(other):
        x.add_(1)
    with pytest.raises(AcceleratorError, match="has to wait"):
        x.add_(1)
    cuda.current_stream().wait_stream(other)
    assert x.add_(1).tolist() == [3.0] * 4


def test_memory_outlives_the_work_of_other_streams():
    with pytest.raises(AcceleratorError, match="freed while another stream"), pretend_accelerator():  # noqa: PT012
        cuda = torch.get_device_module(FIRST)
        host, stream = torch.empty(4, pin_memory=True), cuda.Stream(FIRST)
        x = torch.ones(4, device=FIRST)
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        del x
        gc.collect()


# Recordings


def record(cuda, work):
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        work()
    return graph


def test_a_recording_runs_when_it_is_replayed(accelerator, cuda):
    source, target = torch.ones(4, device=FIRST), torch.zeros(4, device=FIRST)
    graph = record(cuda, lambda: target[1:].copy_((source * 2)[1:] + 1))
    assert target.tolist() == [0.0] * 4
    for value in (1, 5):
        source.fill_(value)
        graph.replay()
        assert target.tolist() == [0.0] + [2.0 * value + 1] * 3


FORBIDDEN = {
    "a number": lambda x: float(x[0]),
    "a copy to the host": lambda x: x.cpu(),
    "an upload": lambda x: torch.ones(4).to(FIRST),
    "pinned memory": lambda x: torch.empty(4, pin_memory=True),
    "waiting": lambda x: torch.get_device_module(FIRST).synchronize(),
    "returning memory": lambda x: torch.get_device_module(FIRST).empty_cache(),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_in_a_recording(accelerator, cuda, name):
    x = torch.ones(4, device=FIRST)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        record(cuda, lambda: FORBIDDEN[name](x))


def test_memory_of_a_recording_is_not_freed_and_must_exist(accelerator, cuda):
    """Temporaries belong to the pool as long as the recording; what it reads must be there at the replay."""
    memory, x = accelerator.memory[0], torch.ones(1 * MIB, device=FIRST)
    cuda.empty_cache()
    before = memory.reserved
    graph = record(cuda, lambda: x * 2 * 3)
    cuda.empty_cache()
    assert memory.reserved >= before + 4 * MIB
    x = None
    with pytest.raises(AcceleratorError, match="memory that was freed"):
        graph.replay()
    del graph
    cuda.empty_cache()
    assert memory.reserved < before


# Memory


def test_memory_is_limited_and_counted():
    with pretend_accelerator(total=1 * GIB, context=100 * MIB, others=200 * MIB) as board:
        cuda, memory = torch.get_device_module(FIRST), board.memory[0]
        assert cuda.mem_get_info(FIRST) == (724 * MIB, GIB)
        x = torch.empty(500 * MIB, dtype=torch.uint8, device=FIRST)
        assert (cuda.memory_reserved(FIRST), memory.live) == (500 * MIB, 500 * MIB)
        with pytest.raises(torch.OutOfMemoryError, match=r"out of memory. Tried to allocate 300.00 MiB"):
            torch.empty(300 * MIB, dtype=torch.uint8, device=FIRST)
        del x
        assert (cuda.memory_reserved(FIRST), memory.live) == (500 * MIB, 0)
        cuda.set_per_process_memory_fraction(0.1, FIRST)
        cuda.empty_cache()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(110 * MIB, dtype=torch.uint8, device=FIRST)
        assert cuda.memory_reserved(FIRST) == 0
        assert cuda.max_memory_reserved(FIRST) == 500 * MIB
        cuda.reset_peak_memory_stats(FIRST)
        assert cuda.max_memory_reserved(FIRST) == 0
