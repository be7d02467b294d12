"""Chain pictures: what the steps before a super-resolution step really hand it, made before the training begins.

At render time a step enlarges the output of the steps below, with its artefacts, not a reduced photograph. A structure
file has no encoder, so a picture that resembles the photograph is found by inverting it: the code z_0 is fitted to the
photograph through the VAE scales, and the GAN scales above draw their noise afresh. The steps between are then run on it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.archs.hpvaegan import Structure
from engine.bands.stream import RowStream
from engine.stages import Stage
from engine.tensors import write_tensors
from engine.training.data import Photo, Size
from engine.training.picture import open_picture

ITERATIONS = 200
RATE = 0.05
PRIOR = 0.1
"""Weight of (mean square of the code - 1)^2 beside the mean square error of the pictures (in [-1, 1]). A render draws
codes from N(0, 1), whose mean square is 1: fitted without it, the code shrinks to values that no render sees."""
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
    structure: Structure,
    photo: Photo,
    previous: Sequence[Previous],
    counts: Counts,
    generator: torch.Generator,
    device: torch.device,
    scratch: Path,
    tell: Tell,
) -> Chain:
    """Fit the code, draw the pictures and run the steps below on each. `scratch`: a file for the photograph's pixels."""
    structure = structure.to(device)
    reals = [_photograph(photo, size, scratch)[None].to(device) * 2 - 1 for size in _fitted_sizes(structure)]
    code = invert(structure, reals, generator)
    fitted = _psnr((_scale(structure, code, len(reals) - 1) + 1) / 2, (reals[-1] + 1) / 2)
    tell(f"step 1 inverted: PSNR {fitted:.1f} dB, code of mean square {float(code.square().mean()):.2f}")
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
        picture = draw(structure, code if paired else _normal(code.shape, generator, device), generator)
        for step in previous:
            picture = enlarge(step, picture, generator)
        picture = picture.half().cpu()
        if paired:
            errors.append(_psnr(picture, truth))
        pictures.append(ChainPicture(picture, truth if paired else picture, paired))
        tell(f"chain picture {number + 1} of {total}: {size[1]}x{size[0]}")
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


def invert(structure: Structure, reals: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The code [1, latent, h, w] whose pictures at the first scales are closest to `reals` [1, 3, h, w], by Adam."""
    like = reals[0]
    z = _normal((1, structure.config.latent, *structure.sizes[0]), generator, like.device)
    z.requires_grad_(True)
    adam = torch.optim.Adam([z], lr=RATE)
    for _ in range(ITERATIONS):
        picture = structure.base(z)
        loss = F.mse_loss(picture, reals[0]) + PRIOR * (z.square().mean() - 1) ** 2
        for m, real in enumerate(reals[1:], 1):
            picture = structure.refine(m, picture, structure.sizes[m])
            loss = loss + F.mse_loss(picture, real)
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return z.detach()


@torch.no_grad()
def draw(structure: Structure, z: Tensor, generator: torch.Generator) -> Tensor:
    """The whole picture [3, H, W] in [0, 1] of a code, with fresh noise at the GAN scales."""

    def noise(m: int, shape: tuple[int, int, int]) -> Tensor:
        return z[0] if m == 0 else _normal(shape, generator, z.device)

    return structure.sample(noise)


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


def _fitted_sizes(structure: Structure) -> Sequence[Size]:
    """Of scale 0 and of the VAE scales, where a reconstruction has no noise of its own."""
    return structure.sizes[: structure.config.last_vae + 1]


def _photograph(photo: Photo, size: Size, scratch: Path) -> Tensor:
    """float32 [3, h, w] in [0, 1]."""
    return open_picture(photo, size, scratch).crop(0, 0, *size).float() / 255


@torch.no_grad()
def _scale(structure: Structure, z: Tensor, m: int) -> Tensor:
    picture = structure.base(z)
    for k in range(1, m + 1):
        picture = structure.refine(k, picture, structure.sizes[k])
    return picture


def _normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).to(device)


def _psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in [0, 1], in dB."""
    return float(-10 * torch.log10(F.mse_loss(a.float(), b.float()).clamp_min(1e-12)))
