"""Simulated inputs of a super-resolution step: outputs of the steps below it, computed before training.

In a render a step enlarges the output of the steps below, artefacts included, not a reduced photograph. Step 1 has no encoder,
so inversion finds images that resemble the photograph. The code z_0 is fitted to the photograph through the VAE scales,
and the noise of each GAN scale is optimised towards it. The steps in between then enlarge the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from engine.archs.hpvaegan import BaseGenerator
from engine.bands.stream import RowStream
from engine.io.photo import Photo
from engine.io.tensors import open_tensors, write_tensors
from engine.metrics.psnr import psnr
from engine.run.stage import Stage
from engine.training.photo import Size, open_picture
from engine.training.run.adam import Adam

CODE_STEPS, CODE_RATE = 200, 0.05
"""Adam steps that fit the code, and their learning rate."""

NOISE_STEPS, NOISE_RATE = 10, 0.1
"""Adam steps that optimise the noise of each GAN scale, and their learning rate.

Noise as drawn puts details where the photograph has none. A network trained to turn one into the other learns to blur
(docs/decisions/0016).
"""

PRIOR = 0.1
"""Weight of (mean square - 1)^2 of the code or noise, beside the mean square error of images in [-1, 1].

A render draws from N(0, 1), whose mean square is 1. Without this term the code shrinks to values that no render sees.
"""

PROBE = 64
"""Side of the image whose enlargement is timed for a forecast, pixels."""

MAX_BYTES = 512 << 20
"""Memory of all simulated inputs together, which limits their number."""

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SimulatedInput:
    """One input of the step, and the image that its output should reduce to."""

    picture: Tensor
    """float16 [3, h, w] in [0, 1]."""

    target: Tensor
    """Shape and dtype of ``picture``: the photograph at this size for a reconstruction, ``picture`` itself for a free sample."""

    paired: bool
    """Whether this is a reconstruction of the photograph."""


@dataclass(frozen=True, slots=True)
class SimulatedInputs:
    """All simulated inputs of a run, of one size."""

    pictures: tuple[SimulatedInput, ...]

    psnr_fitted: float
    """PSNR in dB of the reconstruction at the last VAE scale, where the code was fitted."""

    psnr: float
    """Mean PSNR in dB of the reconstructions as they enter the step."""

    @property
    def size(self) -> Size:
        """(height, width) of every input."""
        height, width = self.pictures[0].picture.shape[1:]
        return height, width


@dataclass(frozen=True, slots=True)
class PreviousStep:
    """A super-resolution step below the one in training."""

    stage: Stage

    sigma: float
    """Standard deviation of its input noise in a render, for images in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of simulated inputs."""

    reconstructions: int
    samples: int
    """Free samples, drawn from random codes."""

    def within(self, size: Size, max_bytes: int = MAX_BYTES) -> Counts:
        """As many inputs of (height, width) as fit, in the same proportion, at least one of each kind that was requested."""
        room = max(1, max_bytes // (size[0] * size[1] * 3 * 2))
        total = self.reconstructions + self.samples
        if total <= room:
            return self
        paired = max(min(self.reconstructions, 1), self.reconstructions * room // total)
        return Counts(paired, max(min(self.samples, 1), room - paired) if self.samples else 0)


def simulate_inputs(
    structure: BaseGenerator,
    photo: Photo,
    previous: Sequence[PreviousStep],
    counts: Counts,
    generator: torch.Generator,
    device: torch.device,
    scratch: Path,
    log: Log,
) -> SimulatedInputs:
    """Fit the code, generate step 1's images and enlarge each with the previous steps.

    Args:
        structure: step 1; it is moved to ``device``.
        photo: the photograph to reconstruct.
        previous: the steps between step 1 and the one in training, lowest first.
        counts: requested numbers, reduced to what ``MAX_BYTES`` holds.
        generator: CPU generator of every code and noise.
        device: where step 1 and the inversion run.
        scratch: file for the photograph's pixels where they exceed memory.
        log: receives a line for each image.

    Raises:
        InputError: the photograph cannot be decoded.
    """
    structure = structure.to(device)
    reals = [_read_photo(photo, size, scratch)[None].to(device) * 2 - 1 for size in structure.sizes]
    last_vae = structure.config.last_vae
    code = invert(structure, reals[: last_vae + 1], generator)
    fitted = _psnr(_to_unit_range(_image_at_scale(structure, code, last_vae)), _to_unit_range(reals[last_vae]))
    log(f"step 1 inverted: PSNR {fitted:.1f} dB, mean square of the code {float(code.square().mean()):.2f}")
    factor = 1
    for step in previous:
        factor *= step.stage.scale
    size = (structure.base_size[0] * factor, structure.base_size[1] * factor)
    truth = _read_photo(photo, size, scratch).half().contiguous()
    counts = counts.within(size)
    total = counts.reconstructions + counts.samples
    pictures, errors = [], []
    for number in range(total):
        paired = number < counts.reconstructions
        picture = reconstruct(structure, code, reals, generator) if paired else draw(structure, generator)
        for step in previous:
            picture = enlarge(step, picture, generator)
        picture = picture.half().cpu()
        if paired:
            errors.append(_psnr(picture, truth))
        pictures.append(SimulatedInput(picture, truth if paired else picture, paired))
        log(f"simulated input {number + 1} of {total}: {size[1]}x{size[0]}")
    return SimulatedInputs(tuple(pictures), fitted, sum(errors) / max(1, len(errors)))


def seconds_to_simulate(
    structure: BaseGenerator, previous: Sequence[PreviousStep], counts: Counts, device: torch.device
) -> float:
    """Forecast the duration of ``simulate_inputs`` from single steps of it; the arguments are as there."""
    generator = torch.Generator().manual_seed(0)
    structure = structure.to(device)
    reals = [torch.zeros(1, 3, *size, device=device) for size in structure.sizes]
    fitted = reals[: structure.config.last_vae + 1]
    code, fit = _timed(lambda: invert(structure, fitted, generator, steps=1))
    _, one = _timed(lambda: reconstruct(structure, code, reals, generator, steps=1))
    _, sample = _timed(lambda: draw(structure, generator))
    size = structure.base_size
    enlarging = 0.0
    for step in previous:
        side = step.stage.align * -(-PROBE // step.stage.align)
        small = torch.full((3, side, side), 0.5, device=device)
        _, seconds = _timed(lambda step=step, small=small: enlarge(step, small, generator))  # type: ignore[misc]
        enlarging += seconds * size[0] * size[1] / side**2
        size = (size[0] * step.stage.scale, size[1] * step.stage.scale)
    counts = counts.within(size)
    total = counts.reconstructions + counts.samples
    return CODE_STEPS * fit + NOISE_STEPS * one * counts.reconstructions + sample * counts.samples + enlarging * total


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Result and duration of the second call; the first one prepares libraries."""
    run()
    started = time.perf_counter()
    result = run()
    result.cpu()  # waits for the device
    return result, time.perf_counter() - started


def cached_inputs(path: Path, key: str, simulate: Callable[[], SimulatedInputs]) -> SimulatedInputs:
    """Read the inputs from a file, or simulate them and write it, so that a resumed run does not repeat the work.

    Args:
        path: the file; one that is missing, damaged or of another ``key`` is replaced.
        key: identifies everything that the inputs depend on.
        simulate: called when the file does not hold inputs of ``key``.

    Raises:
        InputError: the file cannot be written.
    """
    if (cached := _read(path, key)) is not None:
        return cached
    inputs = simulate()
    tensors = {str(i): one.picture for i, one in enumerate(inputs.pictures)}
    if inputs.pictures[0].paired:
        tensors["photograph"] = inputs.pictures[0].target
    paired = [one.paired for one in inputs.pictures]
    metadata = {"key": key, "psnr_fitted": inputs.psnr_fitted, "psnr": inputs.psnr, "paired": paired}
    write_tensors(path, tensors, {"chain": json.dumps(metadata)})
    return inputs


def _read(path: Path, key: str) -> SimulatedInputs | None:
    try:
        with open_tensors(path) as file:
            metadata = json.loads((file.metadata() or {}).get("chain", "{}"))
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError):
        return None  # missing or truncated: the caller simulates again
    pictures = (
        SimulatedInput(tensors[str(i)], tensors["photograph" if paired else str(i)], paired)
        for i, paired in enumerate(metadata["paired"])
    )
    return SimulatedInputs(tuple(pictures), metadata["psnr_fitted"], metadata["psnr"])


def invert(
    structure: BaseGenerator, reals: Sequence[Tensor], generator: torch.Generator, steps: int | None = None
) -> Tensor:
    """Fit a code to the photograph at the VAE scales.

    Args:
        structure: step 1.
        reals: the photograph at the first scales, each [1, 3, h, w] in [-1, 1].
        generator: draws the first code.
        steps: steps of Adam; None: ``CODE_STEPS``.

    Returns:
        The code [1, latent, h, w].
    """

    def error(z: Tensor) -> Tensor:
        picture = structure.base(z)
        loss = F.mse_loss(picture, reals[0])
        for m, real in enumerate(reals[1:], 1):
            picture = structure.refine(m, picture, structure.sizes[m])
            loss = loss + F.mse_loss(picture, real)
        return loss

    z = _normal((1, structure.config.latent, *structure.sizes[0]), generator, reals[0].device)
    return _optimise(z, error, CODE_STEPS if steps is None else steps, CODE_RATE)


def reconstruct(
    structure: BaseGenerator,
    code: Tensor,
    reals: Sequence[Tensor],
    generator: torch.Generator,
    steps: int | None = None,
) -> Tensor:
    """Generate the image of a fitted code, with noise optimised towards the photograph.

    Args:
        structure: step 1.
        code: [1, latent, h, w] from ``invert``.
        reals: the photograph at every scale, each [1, 3, h, w] in [-1, 1].
        generator: draws the first noise of each GAN scale.
        steps: steps of Adam for each scale; None: ``NOISE_STEPS``.

    Returns:
        The image [3, H, W] in [0, 1].
    """
    first = structure.config.last_vae + 1
    steps = NOISE_STEPS if steps is None else steps
    picture = _image_at_scale(structure, code, first - 1)
    for m, real in enumerate(reals[first:], first):
        picture = _optimise_noise(structure, m, picture, real, _normal(real.shape, generator, real.device), steps)
    return _to_unit_range(picture[0])


def draw(structure: BaseGenerator, generator: torch.Generator) -> Tensor:
    """Image [3, H, W] in [0, 1] of a random code."""
    return structure.sample(lambda _, shape: torch.randn(shape, generator=generator))


@torch.no_grad()
def enlarge(step: PreviousStep, picture: Tensor, generator: torch.Generator) -> Tensor:
    """Enlarge an image in bands, whose memory does not grow with the height.

    Args:
        step: the network and its input noise.
        picture: [3, H, W] in [0, 1].
        generator: CPU generator of the noise.

    Returns:
        float16 [3, scale * H, scale * W] in [0, 1] on the device of ``picture``.
    """
    stage, (_, height, width) = step.stage, picture.shape
    right, bottom = -width % stage.align, -height % stage.align
    padded = F.pad(picture[None], (0, right, 0, bottom), mode="reflect")
    plan = stage.stream_plan(width + right)
    stream = RowStream(plan, stage.device)
    rows, scale = padded.shape[2], stage.scale
    stream.start(0, rows)
    result = torch.empty(3, rows * scale, (width + right) * scale, dtype=torch.float16, device=picture.device)
    done = top = 0
    while done < result.shape[1]:
        band = padded[:, :, top : top + plan.band].float()
        if step.sigma:
            band = band + step.sigma * _normal(band.shape, generator, band.device)
        if stage.noise_channels:
            noise = _normal((1, stage.noise_channels, *band.shape[2:]), generator, band.device)
            band = torch.cat([band, noise], 1)
        for first, pixels in stage.push(stream, F.pad(band, (0, 0, 0, plan.band - band.shape[2]))):
            done = first + pixels.shape[2]
            result[:, first:done] = pixels[0].float().clamp(0, 1)
        top += plan.band
    return result[:, : height * scale, : width * scale].contiguous()


def _optimise_noise(
    structure: BaseGenerator, m: int, source: Tensor, real: Tensor, noise: Tensor, steps: int
) -> Tensor:
    """Image of scale ``m``, refined from ``source`` with noise optimised towards ``real``."""

    def refined(noise: Tensor) -> Tensor:
        return structure.refine(m, source, structure.sizes[m], structure.sigmas[m] * noise)

    noise = _optimise(noise, lambda z: F.mse_loss(refined(z), real), steps, NOISE_RATE)
    with torch.no_grad():
        return refined(noise)


def _optimise(z: Tensor, error: Callable[[Tensor], Tensor], steps: int, rate: float) -> Tensor:
    """Minimise ``error`` over ``z`` by Adam, with ``PRIOR`` keeping its mean square near 1."""
    z = z.detach().requires_grad_(True)
    adam = Adam([([z], rate)], (0.9, 0.999))
    for _ in range(steps):
        loss = error(z) + PRIOR * (z.square().mean() - 1) ** 2
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return z.detach()


def _read_photo(photo: Photo, size: Size, scratch: Path) -> Tensor:
    """float32 [3, h, w] in [0, 1]."""
    return open_picture(photo, size, scratch).crop(0, 0, *size).float() / 255


@torch.no_grad()
def _image_at_scale(structure: BaseGenerator, z: Tensor, m: int) -> Tensor:
    picture = structure.base(z)
    for k in range(1, m + 1):
        picture = structure.refine(k, picture, structure.sizes[k])
    return picture


def _normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).to(device)


def _to_unit_range(picture: Tensor) -> Tensor:
    """Convert from step 1's [-1, 1] to [0, 1]."""
    return ((picture + 1) / 2).clamp(0, 1)


def _psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of images in [0, 1], at most 120."""
    return float(psnr(F.mse_loss(a.float(), b.float()), floor=1e-12))
