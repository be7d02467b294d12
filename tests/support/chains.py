"""Chains of stages with lanes, as a render builds them, and a sink that keeps what it is given."""

import threading
import time

import numpy as np
import torch

from engine.archs.esrgan import RRDBNet
from engine.device.queue import DeviceQueue
from engine.geometry import Box
from engine.io.photo import TensorSource
from engine.plan.plan import BATCHED, Plan, StagePlan, shard_of
from engine.run.batched import BatchRunner
from engine.run.stage import Stage
from engine.run.tile_cache import Scratch, TileCache
from engine.run.tiles import TiledStage, one_by_one

CPU = torch.device("cpu")


def small_network(gain=1.0):
    """On tiles of 48 x 48 a batch has the bits of its images (tests/test_stages.py). ``gain``: of the maps before the last
    convolution, which takes it back: it makes half precision overflow, and not float32.
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
    """Stages over ``image``. ``batches``: of the lanes, None for the reference. ``ran``: the stage of every finished tile."""

    def __init__(self, folder, network, image, cores, halo, batches=None, sigma=0.0, roi=None, stages=None):
        self.ran = []
        self.runners, self.images, size = [], [], tuple(image.shape[1:])
        below, plans = TensorSource(image), []
        self.stages = stages or [Stage(network, CPU, "fp32") for _ in cores]
        queue = DeviceQueue(CPU)
        for index, (core, stage) in enumerate(zip(cores, self.stages, strict=True)):
            last = index == len(cores) - 1
            cut = StagePlan(f"stage {index + 1}", *size, stage.scale, stage.align, halo, core, sigma, None)
            run = one_by_one
            if batches is not None:
                run = BatchRunner(queue, stage, cut, index, batches[index], last)
                self.runners.append(run)
            scratch = Scratch(folder / str(index), cut.grid, np.uint8 if last else np.float32)
            below = TiledStage(cut, index, 7, stage, below, TileCache(1 << 30, scratch), last, self._ran, run)
            self.images.append(below)
            plans.append(cut)
            size = below.size
        self.image = self.images[-1]
        shard, chunk = shard_of(cores[-1] * self.stages[-1].scale)
        base, whole = tuple(image.shape[1:]), Box(0, 0, *size)
        self.plan = Plan(
            size, roi or whole, base, tuple(plans), shard, chunk, 7, "", "fp32", "auto", "cpu", executor=BATCHED
        )

    def _ran(self, position, _):
        self.ran.append(position)


class Sink:
    """Keeps pixels and counts. ``fails``: number of the write that raises OSError; ``gate``: what writes wait for."""

    def __init__(self, plan, fails=0, gate=None, seconds=0.0):
        self.plan = plan
        self.pixels = np.zeros((3, *plan.size), np.uint8)
        self.boxes = []
        self.begun = 0
        self._fails, self._gate, self._seconds = fails, gate, seconds
        self._lock = threading.Lock()

    def missing(self):
        return (box for box in list(self.plan.writes()) if box not in self.boxes)

    def write(self, box, pixels):
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
