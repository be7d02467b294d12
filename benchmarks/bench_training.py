"""Training: speed of step 1 compared with a plain implementation, and peak memory of step 1 and of fine-tuning.

    python benchmarks/bench_training.py [speed | memory]

Speed: seconds per iteration at three scales of the example's photograph, both implementations in turn in one run. Also the
losses of both after the same iterations of one scale from the same weights. Writes results/training.csv. The plain
implementation

* uses float32 and contiguous tensors,
* concatenates the coordinate to every convolution's input,
* runs reconstruction and sample in two passes and the discriminator once per image,
* differentiates the penalty by autograd's double backward,
* and computes all scales below again with gradients.

Memory: peak resident memory of the whole process, for two iterations of every scale of step 1 and for two iterations of
fine-tuning. Fine-tuning has the paper's crops and batches and random weights of VGG-19. Writes results/training_memory.csv.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from harness import PHOTOS, publish
from safetensors.torch import save_file
from torch import nn

from engine.archs.hpvaegan import BASE_WIDTH, LEAST_WIDTH, Config, VerticalCoordConv2d, vertical_coordinates
from engine.cli.app import main as engine_command
from engine.io.photo import open_photo
from engine.training.losses.vgg import LAYOUTS, build_layers
from engine.training.structure.losses import PENALTY, LossWeights
from engine.training.structure.trainer import CLIP, LEARNING_RATE, RECONSTRUCTION, Settings, StructureTrainer

PHOTO = PHOTOS / "picosdeeuropa-crop.jpg"
SCALES, REPEATS = (5, 7, 9), 7
COMPARED, ITERATIONS, LAST = 5, 200, 50


def concatenated(conv, x):
    """Usual implementation of ``VerticalCoordConv2d.forward``."""
    n, _, height, width = x.shape
    y = vertical_coordinates(height).view(1, 1, height, 1).expand(n, 1, height, width)
    return conv._padded(torch.cat([x, y], 1), conv.weight, conv.bias)


class Plain:
    """Direct implementation of the algorithm with the same networks and losses."""

    def __init__(self, trainer, m):
        self.m, self.config, self.reals = m, trainer.config, [real.contiguous() for real in trainer.reals]
        self.structure, self.encoder, self.discriminator = (
            copy.deepcopy(part).to(memory_format=torch.contiguous_format)
            for part in (trainer.structure, trainer.encoder, trainer.discriminator)
        )
        self.encoder.requires_grad_(False).eval()
        self.structure.requires_grad_(True)
        self.discriminator.requires_grad_(True)
        rate = {"lr": LEARNING_RATE, "betas": (0.5, 0.999)}
        self.generator_adam = torch.optim.Adam(self.structure.blocks[m - 1].parameters(), **rate)
        self.discriminator_adam = torch.optim.Adam(self.discriminator.parameters(), **rate)

    def image(self, z, noisy):
        image = self.structure.base(z)
        for k in range(1, self.m + 1):
            size, has_noise = self.structure.sizes[k], noisy and k > self.config.last_vae
            noise = self.structure.sigmas[k] * torch.randn(1, 3, *size) if has_noise else None
            image = self.structure.refine(k, image, size, noise)
        return image

    def step(self):
        with mock.patch.object(VerticalCoordConv2d, "forward", concatenated):
            return self._step()

    def _step(self):
        real = self.reals[self.m]
        mean, log_variance = self.encoder(self.reals[0])
        reconstructed = self.image(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean), False)
        fake = self.image(torch.randn_like(mean), True)
        distance = self.discriminator(fake.detach()).mean() - self.discriminator(real).mean()
        mix = torch.rand(())
        between = (mix * real + (1 - mix) * fake.detach()).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.discriminator(between).sum(), between, create_graph=True)
        penalty = ((gradient.norm(dim=1) - 1) ** 2).mean()
        self.discriminator_adam.zero_grad()
        (distance + PENALTY * penalty).backward()
        self.discriminator_adam.step()
        reconstruction = F.mse_loss(reconstructed, real)
        self.structure.zero_grad()
        (RECONSTRUCTION * reconstruction - self.discriminator(fake).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.structure.blocks[self.m - 1].parameters(), CLIP)
        self.generator_adam.step()
        return {"rec": reconstruction.item(), "critic": distance.item()}


def make_trainer(m):
    """A trainer at scale m with fresh blocks below, whose values do not change the cost of an iteration."""
    config, photo = Config(), open_photo(PHOTO, BASE_WIDTH)
    settings = Settings(
        iterations=(ITERATIONS,) * (config.last + 1),
        config=config,
        base_width=BASE_WIDTH,
        least_width=LEAST_WIDTH,
        precision="bf16",
        batch=1,
        losses=LossWeights(),
        sigma=0.05,
        ema=0.0,
        seed=0,
        photo=photo.digest,
    )
    trainer = StructureTrainer(settings, photo, {}, Path(), torch.device("cpu"))
    trainer.phase = m
    trainer.begin()
    return trainer


def seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def timed():
    for m in SCALES:
        ours, spent = make_trainer(m), {"ours": [], "plain": []}
        plain = Plain(ours, m)
        for repeat in range(REPEATS + 1):
            pair = {"ours": seconds(ours.iterate), "plain": seconds(plain.step)}
            if repeat:  # the first one warms up the libraries
                for name, value in pair.items():
                    spent[name].append(value)
        ours_s, plain_s = (statistics.median(spent[name]) for name in ("ours", "plain"))
        height, width = ours.structure.sizes[m]
        report(f"scale {m}, {width}x{height}", "seconds an iteration", ours_s, plain_s)


def losses():
    ours = make_trainer(COMPARED)
    plain = Plain(ours, COMPARED)
    torch.manual_seed(0)
    pairs = [(ours.iterate().values, plain.step()) for _ in range(ITERATIONS)][-LAST:]
    for name in ("rec", "critic"):
        mine, theirs = ([pair[side][name] for pair in pairs] for side in (0, 1))
        report(
            f"scale {COMPARED}, loss {name}",
            f"mean of the last {LAST} of {ITERATIONS}",
            *map(statistics.mean, (mine, theirs)),
        )
        report(
            f"scale {COMPARED}, loss {name}", f"deviation of the last {LAST}", *map(statistics.stdev, (mine, theirs))
        )


def report(case, what, ours, plain):
    row = {
        "case": case,
        "what": what,
        "ours": f"{ours:.4g}",
        "plain": f"{plain:.4g}",
        "plain_over_ours": f"{plain / ours:.2f}",
    }
    publish("training", row)


def memory():
    with tempfile.TemporaryDirectory() as folder:
        vgg = Path(folder, "vgg19.safetensors")
        layers = nn.Sequential(*build_layers(LAYOUTS["VGG-19"]))
        save_file({f"features.{name}": value for name, value in layers.state_dict().items()}, vgg)
        sr = ("sr", "--step", "2", "--preset", "paper", "--vgg", vgg, "--iterations", "2")
        cases = {
            "structure, 256x192": ("structure", "--preset", "quick", "--iterations", "2"),
            "structure seen by VGG, 256x192": ("structure", "--preset", "quick-vgg", "--vgg", vgg, "--iterations", "2"),
            "RRDBNet 64x23, 16 crops of 128": (*sr, "--start", "realsr"),
            "SwinIR-M, 20 crops of 96": (*sr, "--start", "scratch", "--architecture", "swinir"),
        }
        for case, words in cases.items():
            # A fresh process, because the peak is that of its whole lifetime.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_of, (["train", *map(str, words), "--device", "cpu"], folder))
            row = {"case": case, "resident_MiB": round(peak / 2**20)}
            publish("training_memory", row)


def peak_of(words, folder):
    """Peak resident memory of the command, bytes."""
    words[2:2] = [str(PHOTO), "--out", str(Path(folder, "trained.safetensors"))]
    try:
        engine_command(words)
    except SystemExit as stop:
        if stop.code:
            raise
    Path(folder, "trained.safetensors").unlink()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parts = sys.argv[1:] or ["speed", "memory"]
    if "speed" in parts:
        timed()
        losses()
    if "memory" in parts:
        memory()
