"""Queues of a device and points in them: what has happened before what."""

import time

import torch

from support.accelerator.active import TYPE, active, index_of


class Clock(dict):
    """Stream -> number of its operations that are known to have ended."""

    def learn(self, other):
        for stream, position in other.items():
            if self.get(stream, 0) < position:
                self[stream] = position

    def knows(self, stream, position):
        return self.get(stream, 0) >= position


class Stream:
    """Queue of a device: its operations run in order, those of two streams in any order."""

    def __init__(self, device=None, priority=0, **_):
        self.device = torch.device(TYPE, index_of(device))
        self.clock = Clock({self: 0})
        active().made.append(self)

    @property
    def position(self):
        """Number of its operations so far."""
        return self.clock[self]

    def advance(self):
        """Position of the next operation, which begins after all that the host has waited for."""
        self.clock.learn(active().host)
        self.clock[self] += 1
        return self.clock[self]

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        self.clock.learn(event.clock)
        active().settle(self.clock)

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())

    def synchronize(self):
        active().host_waits(self.clock)

    def query(self):
        self.synchronize()
        return True

    def __enter__(self):
        self._before = active().streams[self.device.index]
        active().streams[self.device.index] = self
        return self

    def __exit__(self, *_):
        active().streams[self.device.index] = self._before


class Event:
    """Point in a stream."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self.clock = Clock()
        self._time = 0.0

    def record(self, stream=None):
        active().refuse_in_recording("recording an event")
        stream = stream or active().stream()
        self.clock = Clock(stream.clock)
        self._time = time.perf_counter()

    def wait(self, stream=None):
        (stream or active().stream()).wait_event(self)

    def synchronize(self):
        active().host_waits(self.clock)

    def query(self):
        self.synchronize()
        return True

    def elapsed_time(self, end):
        return (end._time - self._time) * 1000
