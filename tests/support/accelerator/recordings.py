"""Recorded operations, which a replay repeats on the same memory."""

import gc

import torch
from torch.utils._python_dispatch import _disable_current_modes

from support.accelerator.active import AcceleratorError, active
from support.accelerator.memory import Pool
from support.accelerator.streams import Stream


class CUDAGraph:
    """Recorded operations, which a replay repeats on the same memory."""

    def __init__(self, keep_graph=False):
        self.operations = []
        self.read, self.written = {}, {}
        """Blocks outside the pool: storage -> block."""
        self.pool_handle = None
        self._pool_block = None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        board = active()
        board.refuse_in_recording("a second recording")
        self.pool_handle = pool if pool is not None else Pool()
        self.pool_handle.graphs.add(self)
        board.memory[board.current].pools.add(self.pool_handle)
        board.recording, board.recording_stream = self, board.stream()

    def capture_end(self):
        active().recording = active().recording_stream = None

    def pool(self):
        return self.pool_handle

    def reset(self):
        self.operations = []
        self.pool_handle.graphs.discard(self)

    def replay(self):
        board = active()
        board.refuse_in_recording("a replay")
        for block in (*self.read.values(), *self.written.values()):
            if block.storage is None:
                raise AcceleratorError("a replay touches memory that was freed after the recording")
        stream = board.stream()
        position = stream.advance()
        for block in self.read.values():
            board.reads(block, stream, position)
        for block in self.written.values():
            board.writes(block, stream, position)
        board.uses_pool(self.pool_handle, stream, position)
        board.counts["replays"] += 1
        with _disable_current_modes(), torch.inference_mode():
            for operation in self.operations:
                operation()


class Graph:
    """``torch.cuda.graph``, by its name here."""

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        self.graph, self.pool = cuda_graph, pool
        self.stream = stream or Stream()

    def __enter__(self):
        active().synchronize(self.stream.device)
        gc.collect()
        active().empty_cache()
        self.stream.__enter__()
        self.graph.capture_begin(pool=self.pool)

    def __exit__(self, *_):
        self.graph.capture_end()
        self.stream.__exit__()
