"""Chains of stages as a render builds them, in batches or one by one, and a store in memory."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from engine.archs.esrgan import RRDBNet
from engine.device.queue import DeviceQueue
from engine.io.photo import TensorSource
from engine.run import serial
from engine.run.batched import BatchRunner, run_batches
from engine.run.finish import Finish
from engine.run.pipeline import tile_chain
from engine.run.stage import Stage
from support.plans import plan_of, stages_of

CPU = torch.device("cpu")


def small_network(gain=1.0):
    """RRDBNet x4 whose batches have the bits of their images on tiles of 48 x 48 (tests/run/test_stage.py).

    ``gain`` scales the feature maps before the last convolution, which undoes it: half precision overflows, float32 does
    not.
    """
    torch.manual_seed(0)
    network = RRDBNet(channels=16, blocks=1, growth=8)
    with torch.no_grad():
        network.conv_last.bias.fill_(0.5)
        network.conv_last.weight.mul_(3 / gain)
        for parameter in network.conv_hr.parameters():
            parameter.mul_(gain)
    return network.eval().requires_grad_(False)


class Chain:
    """Stages over ``image`` as an executor gets them. ``ran``: position of the stage of every finished tile.

    Args:
        folder: scratch folder.
        network: network of every stage.
        image: [3, h, w].
        tiles: tile of every stage, in LR pixels.
        halo: halo of every stage, in LR pixels.
        batches: tiles of each stage that run at once; None for the reference executor.
        sigma: standard deviation of the input noise.
        roi: region to render; None for the whole image.
        stages: stages to use, in place of ``network``.
    """

    def __init__(self, folder, network, image, tiles, halo, *, batches=None, sigma=0.0, roi=None, stages=None):
        self.ran = []
        self.stages = stages or [Stage(network, CPU, "fp32") for _ in tiles]
        base = tuple(image.shape[1:])
        halos, scales = [halo] * len(tiles), [stage.scale for stage in self.stages]
        cuts = tuple(replace(s, sigma=sigma) for s in stages_of(base, tiles, halos, scales))
        size = cuts[-1].grid.bounds.shape
        plan = plan_of(size, base, cores=tiles, halos=halos, scales=scales, roi=roi, seed=7)
        self.plan = replace(plan, stages=cuts, executor="batched")
        self.runners = None
        if batches is not None:
            queue = DeviceQueue(CPU)
            self.runners = [BatchRunner(queue, *parts) for parts in zip(self.stages, cuts, batches, strict=True)]
        self.images = tile_chain(
            cuts, self.stages, TensorSource(image), seed=7, scratch=folder, runners=self.runners, cache_bytes=1 << 30,
            on_pixels=lambda position, _: self.ran.append(position),
        )  # fmt: skip
        self.image = self.images[-1]

    def render(self, sink):
        """Yield every write of the reference executor, or of the batched one."""
        if self.runners is not None:
            return run_batches(self.plan, self.image, self.runners, sink, Finish())
        return serial.run(SimpleNamespace(plan=self.plan, tiles=lambda: self.images, finish=Finish()), sink)


class Sink:
    """A store in memory.

    Args:
        plan: plan of the render.
        fails: number of the write that raises OSError; 0 for none.
        gate: event that writes wait for.
        seconds: duration of a write.
    """

    def __init__(self, plan, *, fails=0, gate=None, seconds=0.0):
        self.plan = plan
        self.pixels = np.zeros((3, *plan.size), np.uint8)
        self.boxes = []
        self.begun = 0
        self._fails, self._gate, self._seconds = fails, gate, seconds
        self._lock = threading.Lock()

    def missing(self):
        return (box for box in list(self.plan.writes()) if box not in self.boxes)

    def write(self, box, pixels, half=None):
        with self._lock:
            self.begun += 1
            number = self.begun
        if self._gate is not None:
            assert self._gate.wait(60)
        time.sleep(self._seconds)
        if number == self._fails:
            raise OSError(28, "No space left on device")
        self.pixels[(slice(None), *box.slices)] = pixels
        with self._lock:
            self.boxes.append(box)
