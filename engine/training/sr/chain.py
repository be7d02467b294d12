"""Chain pictures: what the steps before a super-resolution step really hand it, made before the training begins.

At render time a step enlarges the output of the steps below, with its artefacts, not a reduced photograph. A structure
file has no encoder, so a picture that resembles the photograph is found by inverting it: the code z_0 is fitted to the
photograph through the VAE scales, and the noise that the GAN scales draw is led towards it. The steps between are then run
on it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.archs.hpvaegan import BaseGenerator
from engine.bands.stream import RowStream
from engine.io.photo import Photo
from engine.io.tensors import write_tensors
from engine.run.stage import Stage
from engine.training.photo import Size, open_picture
from engine.training.run.adam import Adam

ITERATIONS = 200
RATE = 0.05
PRIOR = 0.1
"""Weight of (mean square of the code - 1)^2 beside the mean square error of the pictures (in [-1, 1]). A render draws
codes from N(0, 1), whose mean square is 1: fitted without it, the code shrinks to values that no render sees."""
LED = 10
"""Steps that lead the noise of each GAN scale. As drawn, what these scales invent lies elsewhere than in the photograph, and a
network that is asked to make the one of the other learns to blur (docs/decisions/0016)."""
LED_RATE = 0.1
MOST_BYTES = 512 << 20  # of all pictures together; where one is large there are fewer

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ChainPicture:
    """An input of the step, fp16 [3, h, w] in [0, 1], and what its output should reduce to: the photograph at this size
    for a reconstruction, the input itself for a free sample (`paired` tells which).
    """

    picture: Tensor
    target: Tensor
    paired: bool


@dataclass(frozen=True, slots=True)
class Chain:
    """All chain pictures, and how much the reconstructions resemble the photograph, PSNR in dB: at the last VAE scale,
    where the code was fitted, and as they enter this step (mean).
    """

    pictures: tuple[ChainPicture, ...]
    psnr_fitted: float
    psnr: float

    @property
    def size(self) -> Size:
        """(height, width) of every picture."""
        height, width = self.pictures[0].picture.shape[1:]
        return height, width


@dataclass(frozen=True, slots=True)
class Previous:
    """A step below, at work, and the input noise that a render gives it."""

    stage: Stage
    sigma: float


@dataclass(frozen=True, slots=True)
class Counts:
    """How many pictures are wanted: reconstructions of the photograph and free samples."""

    reconstructions: int
    samples: int

    def within(self, size: Size, most: int = MOST_BYTES) -> "Counts":
        """As many as fit, of both kinds in their proportion, at least one of each kind that is wanted."""
        room = max(1, most // (size[0] * size[1] * 3 * 2))
        total = self.reconstructions + self.samples
        if total <= room:
            return self
        paired = max(min(self.reconstructions, 1), self.reconstructions * room // total)
        return Counts(paired, max(min(self.samples, 1), room - paired) if self.samples else 0)


def make_chain(
    structure: BaseGenerator,
    photo: Photo,
    previous: Sequence[Previous],
    counts: Counts,
    generator: torch.Generator,
    device: torch.device,
    scratch: Path,
    log: Tell,
) -> Chain:
    """Fit the code, draw the pictures and run the steps below on each. `scratch`: a file for the photograph's pixels."""
    structure = structure.to(device)
    reals = [_photograph(photo, size, scratch)[None].to(device) * 2 - 1 for size in structure.sizes]
    last_vae = structure.config.last_vae
    code = invert(structure, reals[: last_vae + 1], generator)
    fitted = _psnr(_unit(_scale(structure, code, last_vae)), _unit(reals[last_vae]))
    log(f"step 1 inverted: PSNR {fitted:.1f} dB, code of mean square {float(code.square().mean()):.2f}")
    factor = 1
    for step in previous:
        factor *= step.stage.scale
    size = (structure.base_size[0] * factor, structure.base_size[1] * factor)
    truth = _photograph(photo, size, scratch).half().contiguous()
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
        pictures.append(ChainPicture(picture, truth if paired else picture, paired))
        log(f"chain picture {number + 1} of {total}: {size[1]}x{size[0]}")
    return Chain(tuple(pictures), fitted, sum(errors) / max(1, len(errors)))


def keep_chain(path: Path, key: str, make: Callable[[], Chain]) -> Chain:
    """The chain of the file if `key` is its own; else a new one, written to the file, so that a resumed run need not
    make it again.
    """
    if (kept := _read(path, key)) is not None:
        return kept
    chain = make()
    tensors = {str(i): one.picture for i, one in enumerate(chain.pictures)}
    if chain.pictures[0].paired:
        tensors["photograph"] = chain.pictures[0].target
    paired = [one.paired for one in chain.pictures]
    about = {"key": key, "psnr_fitted": chain.psnr_fitted, "psnr": chain.psnr, "paired": paired}
    write_tensors(path, tensors, {"chain": json.dumps(about)})
    return chain


def _read(path: Path, key: str) -> Chain | None:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("chain", "{}"))
            if about.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError):
        return None  # not there, or cut short: it is made again
    pictures = (
        ChainPicture(tensors[str(i)], tensors["photograph" if paired else str(i)], paired)
        for i, paired in enumerate(about["paired"])
    )
    return Chain(tuple(pictures), about["psnr_fitted"], about["psnr"])


def invert(structure: BaseGenerator, reals: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The code [1, latent, h, w] whose pictures at the first scales are closest to `reals` [1, 3, h, w], by Adam."""

    def error(z: Tensor) -> Tensor:
        picture = structure.base(z)
        loss = F.mse_loss(picture, reals[0])
        for m, real in enumerate(reals[1:], 1):
            picture = structure.refine(m, picture, structure.sizes[m])
            loss = loss + F.mse_loss(picture, real)
        return loss

    z = _normal((1, structure.config.latent, *structure.sizes[0]), generator, reals[0].device)
    return _fit(z, error, ITERATIONS, RATE)


def reconstruct(structure: BaseGenerator, code: Tensor, reals: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The whole picture [3, H, W] in [0, 1] of a fitted code; the noise of each GAN scale is drawn, and then led so that the
    scale's picture comes closer to the photograph, `reals` [1, 3, h, w] at every scale in [-1, 1].
    """
    first = structure.config.last_vae + 1
    picture = _scale(structure, code, first - 1)
    for m, real in enumerate(reals[first:], first):
        picture = _led(structure, m, picture, real, _normal(real.shape, generator, real.device))
    return _unit(picture[0])


def draw(structure: BaseGenerator, generator: torch.Generator) -> Tensor:
    """The whole picture [3, H, W] in [0, 1] of a random code."""
    return structure.sample(lambda _, shape: torch.randn(shape, generator=generator))


@torch.no_grad()
def enlarge(step: Previous, picture: Tensor, generator: torch.Generator) -> Tensor:
    """[3, H, W] in [0, 1] -> fp16 [3, scale H, scale W] on the same device, clamped; in bands, so memory is bounded."""
    stage, (_, height, width) = step.stage, picture.shape
    right, below = -width % stage.align, -height % stage.align
    padded = F.pad(picture[None], (0, right, 0, below), mode="reflect")
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


def _led(structure: BaseGenerator, m: int, below: Tensor, real: Tensor, noise: Tensor) -> Tensor:
    """The picture of scale m upon the one below, its noise led towards the photograph."""

    def refined(noise: Tensor) -> Tensor:
        return structure.refine(m, below, structure.sizes[m], structure.sigmas[m] * noise)

    noise = _fit(noise, lambda z: F.mse_loss(refined(z), real), LED, LED_RATE)
    with torch.no_grad():
        return refined(noise)


def _fit(z: Tensor, error: Callable[[Tensor], Tensor], steps: int, rate: float) -> Tensor:
    """`z`, by Adam moved to where the error is small and its mean square still 1."""
    z = z.detach().requires_grad_(True)
    adam = Adam([([z], rate)], (0.9, 0.999))
    for _ in range(steps):
        loss = error(z) + PRIOR * (z.square().mean() - 1) ** 2
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return z.detach()


def _photograph(photo: Photo, size: Size, scratch: Path) -> Tensor:
    """float32 [3, h, w] in [0, 1]."""
    return open_picture(photo, size, scratch).crop(0, 0, *size).float() / 255


@torch.no_grad()
def _scale(structure: BaseGenerator, z: Tensor, m: int) -> Tensor:
    picture = structure.base(z)
    for k in range(1, m + 1):
        picture = structure.refine(k, picture, structure.sizes[k])
    return picture


def _normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).to(device)


def _unit(picture: Tensor) -> Tensor:
    """From [-1, 1], where step 1 computes, to [0, 1]."""
    return ((picture + 1) / 2).clamp(0, 1)


def _psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in [0, 1], in dB."""
    return float(-10 * torch.log10(F.mse_loss(a.float(), b.float()).clamp_min(1e-12)))
