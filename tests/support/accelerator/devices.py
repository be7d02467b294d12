"""The devices: their streams, the order of what these do, and their memory."""

import weakref
from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.accelerator.active import AcceleratorError, index_of
from support.accelerator.memory import GRANULE, Block, Memory, fill_garbage, relabel, round_up, view
from support.accelerator.streams import Clock, Stream


class Devices(TorchDispatchMode):
    """Devices, their streams and their memory. ``Accelerator`` runs operations on them."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # it would be imported for every test

    def __init__(self, devices, total, context, others, capability, lists_processes, reads_totals):
        super().__init__()
        self.capability, self.lists_processes, self.reads_totals = capability, lists_processes, reads_totals
        self.names = [f"Pretend {'ABCD'[index]}" for index in range(devices)]
        self.memory = [Memory(index, total, context, others) for index in range(devices)]
        self.current = 0
        self.host = Clock()
        """Work that the host has waited for."""
        self.counts = Counter()
        """Number of ``launches``, ``replays``, ``synchronizations``, and of every operation by name."""
        self.problems = []
        """Errors met where none can be raised."""
        self.recording = self.recording_stream = None
        self.made = []
        self._blocks = {}
        self._pinned = set()
        self._pending = []
        """Copies that have not ended: (stream, position, source's block, function that ends it)."""
        self._pool_uses = weakref.WeakKeyDictionary()
        self._forbidden = 0

    def start(self):
        self.default = [Stream(index) for index in range(len(self.memory))]
        self.streams = list(self.default)

    # Devices and streams

    def stream(self, device=None):
        """The current stream of a device."""
        return self.streams[index_of(device)]

    def synchronize(self, device=None):
        """Wait for all streams of a device."""
        self.refuse_in_recording("synchronizing")
        index = index_of(device)
        self.counts["synchronizations"] += 1
        every = Clock()
        for stream in self.made:
            if stream.device.index == index:
                every.learn(stream.clock)
        self.host_waits(every)

    def host_waits(self, clock):
        """The host knows what a clock knows, and copies up to there have ended."""
        self.refuse_in_recording("synchronizing")
        self.host.learn(clock)
        self.settle(clock)

    def settle(self, clock, block=None):
        """End the copies up to a point; those from ``block`` only, if it is given."""
        ended = [entry for entry in self._pending if clock.knows(*entry[:2]) and (block is None or entry[2] is block)]
        self._pending = [entry for entry in self._pending if entry not in ended]
        for *_, finish in ended:
            finish()

    @contextmanager
    def forbid_synchronization(self):
        """Operations that make the host wait for the device raise; waiting for an event or a stream does not."""
        self._forbidden += 1
        try:
            yield
        finally:
            self._forbidden -= 1

    def _synchronizes(self, name):
        self.refuse_in_recording(f"{name}, which synchronizes,")
        self.counts["synchronizations"] += 1
        if self._forbidden:
            raise AcceleratorError(f"{name} synchronizes where nothing may")
        self.host_waits(self.stream().clock)

    def refuse_in_recording(self, what):
        if self.recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    # Order of reads and writes

    def reads(self, block, stream, position):
        self._ordered(block.written, stream, "reads memory that")
        block.read[stream] = position

    def writes(self, block, stream, position):
        for access in block.accesses():
            self._ordered(access, stream, "overwrites memory that")
        self.settle(Clock(stream.clock), block)
        block.written = (stream, position)
        block.read = {}

    def uses_pool(self, pool, stream, position):
        self._ordered(self._pool_uses.get(pool), stream, "replays into a pool that")
        self._pool_uses[pool] = (stream, position)

    def _ordered(self, access, stream, what):
        if access is not None and access[0] is not stream and not stream.clock.knows(*access):
            raise AcceleratorError(f"a stream {what} another stream still uses: it has to wait for an event")

    # Memory

    def empty_cache(self):
        self.refuse_in_recording("emptying the cache")
        for held in self.memory:
            held.empty_cache()

    def _label(self, result, device):
        """A tensor on ``device`` with the memory of the CPU tensor ``result``, which nothing else uses."""
        storage = result.untyped_storage()
        flat = torch.empty(0, dtype=result.dtype).set_(storage, 0, (storage.nbytes() // result.itemsize,), (1,))
        pool = self.recording.pool_handle if self.recording is not None else None
        memory, size = self.memory[device.index], max(GRANULE, round_up(storage.nbytes(), GRANULE))
        memory.allocate(size, pool)
        labelled = relabel(flat, device.index)
        block = Block(storage, memory, pool, self.stream(device), size)
        own = labelled.untyped_storage()
        self._blocks[own._cdata] = block
        weakref.finalize(own, self._freed, own._cdata)
        return view(labelled, result.size(), result.stride(), result.storage_offset())

    def _freed(self, key):
        block = self._blocks.pop(key)
        (block.memory if block.pool is None else block.pool).live -= block.size
        for stream, position in block.accesses():
            known = (
                stream is block.stream
                or block.stream.clock.knows(stream, position)
                or self.host.knows(stream, position)
            )
            if not known and block.pool is None:
                self.problems.append("memory was freed while another stream still used it")
        block.storage = None

    def block(self, tensor):
        """The memory of a tensor of a device."""
        return self._blocks[tensor.untyped_storage()._cdata]

    def clone_storage(self, storage):
        """A copy of a storage, as ``copy.deepcopy`` makes it."""
        copied = torch.empty(0, dtype=torch.uint8).set_(self.storage_on_host(storage))
        return self._label(copied, storage.device).untyped_storage()

    def storage_on_host(self, storage):
        """A storage's bytes, as ``torch.save`` writes them."""
        self._synchronizes("a copy of a storage")
        return self._blocks[storage._cdata].storage.clone()

    def _on_host(self, tensor):
        """CPU tensor of the same memory."""
        return torch.empty(0, dtype=tensor.dtype).set_(
            self.block(tensor).storage, tensor.storage_offset(), tensor.size(), tensor.stride()
        )

    def _pin(self, tensor):
        self.refuse_in_recording("allocating pinned memory")
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        fill_garbage(tensor)
        return tensor

    def _is_pinned(self, tensor):
        return tensor.untyped_storage()._cdata in self._pinned
