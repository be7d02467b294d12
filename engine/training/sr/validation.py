"""Validation of a network in training: quality on a strip that training never sees, and a sample image.

Quality is PSNR and the sliced Wasserstein distance of patches. When a network begins to draw texture the first falls and the
second improves, so neither is enough alone. Nothing is drawn from the run's generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.archs.layers import RGB
from engine.metrics.psnr import psnr
from engine.training.losses.texture import SlicedWasserstein
from engine.training.photo import Picture, to_unit, write_row
from engine.training.sr.chain import SimulatedInput
from engine.training.sr.pairs import Enlarge

MAX_CROPS = 8
"""Number of validation crops."""

MIN_SIDE = 16
"""Columns that must be held out for a strip to be validated on, in pixels."""

MAX_SIDE = 256
"""Largest side of a validation crop, in pixels."""

SEED = 1
"""Seed of the input noise and of the texture distance."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Mean quality of the validation crops."""

    psnr: float
    """PSNR in dB; higher is better."""

    texture: float
    """Distance of the patch distributions for images in [0, 1]; lower is better."""


class Validation:
    """Fixed validation crops with fixed input noise."""

    def __init__(
        self,
        hr: Tensor,
        lr: Tensor,
        sigma: float,
        noise_channels: int,
        held_out: bool,
        simulated: Sequence[SimulatedInput] = (),
    ) -> None:
        """Draw the input noise.

        Args:
            hr: true crops [N, 3, H, W] in [0, 1].
            lr: reduced crops [N, 3, h, w] in [0, 1].
            sigma: standard deviation of the input noise in a render.
            noise_channels: noise channels of the network.
            held_out: whether training never sees the crops; otherwise they are for the eye only.
            simulated: simulated inputs; the last one is shown.
        """
        self.hr, self.lr, self.held_out = hr, lr, held_out
        self.scale = hr.shape[2] // lr.shape[2]
        shape = (lr.shape[0], RGB + noise_channels, *lr.shape[2:])
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        self.noise[:, :RGB] *= sigma
        self.simulated = _centre_crop(simulated, lr.shape[2])
        self._start: Tensor | None = None

    def inputs(self, *, noise: bool) -> Tensor:
        """The network's inputs for all crops."""
        return self._with_noise(self.lr, noise)

    def quality(self, enlarge: Enlarge, *, noise: bool) -> Quality:
        """Quality of a network's output, with or without input noise."""
        return self._measure(enlarge(self.inputs(noise=noise)))

    def bicubic(self) -> Quality:
        """Quality of a bicubic enlargement."""
        return self._measure(self._bicubic(self.lr))

    def keep_start(self, enlarge: Enlarge) -> None:
        """Keep the network's output before training, to show it beside later ones."""
        self._start = self._sample_rows(enlarge, noise=False)

    def write(self, enlarge: Enlarge, path: Path) -> None:
        """Write a sample image as PNG.

        The columns are a bicubic enlargement, the output before training, the current output with input noise, and the
        photograph. The rows are three crops and, if there is one, a simulated input. No photograph belongs to the latter,
        so its bicubic enlargement is shown again.
        """
        extra = [] if self.simulated is None else [self._bicubic(self.simulated[None])]
        current = self._sample_rows(enlarge, noise=True)
        columns = [
            torch.cat([self._bicubic(_three(self.lr)), *extra]),
            self._start if self._start is not None else current,
            current,
            torch.cat([_three(self.hr), *extra]),
        ]
        write_row([torch.cat(list(column), 1) for column in columns], path)

    def _sample_rows(self, enlarge: Enlarge, *, noise: bool) -> Tensor:
        rows = _three(self.lr)
        if self.simulated is not None:
            rows = torch.cat([rows, self.simulated[None]])
        return enlarge(self._with_noise(rows, noise))

    def _with_noise(self, pictures: Tensor, noise: bool) -> Tensor:
        """[n, 3, h, w] -> [n, 3 + noise channels, h, w]; zeros instead of noise if ``noise`` is False."""
        values = noise * self.noise[torch.arange(len(pictures)) % len(self.noise)]
        return torch.cat([pictures + values[:, :RGB], values[:, RGB:]], 1)

    def _bicubic(self, lr: Tensor) -> Tensor:
        return F.interpolate(lr, scale_factor=self.scale, mode="bicubic", align_corners=False).clamp(0, 1)

    def _measure(self, pictures: Tensor) -> Quality:
        errors = (pictures - self.hr).square().mean((1, 2, 3))
        distance = SlicedWasserstein()(pictures, self.hr, torch.Generator().manual_seed(SEED))
        return Quality(float(psnr(errors, floor=1e-10).mean()), float(distance))


def fixed_crops(photo: Picture, trained: int, grid: int) -> tuple[Tensor, bool]:
    """Cut the validation crops, from top to bottom.

    Args:
        photo: the photograph at the size of the step's output.
        trained: number of columns, from the left, that training may see.
        grid: divisor of a crop's side.

    Returns:
        At most ``MAX_CROPS`` crops [N, 3, side, side] in [0, 1], and whether they lie in columns that training never sees.
    """
    height, width = photo.size
    held_out = width - trained >= max(grid, MIN_SIDE)
    left = trained if held_out else 0
    side = min(MAX_SIDE, height, width - left) // grid * grid
    count = min(MAX_CROPS, height // side)
    shares = [i / max(1, count - 1) for i in range(count)]
    places = [(round(s * (height - side)), left if held_out else round(s * (width - side))) for s in shares]
    return to_unit(torch.stack([photo.crop(y, x, side, side) for y, x in places])), held_out


def _three(crops: Tensor) -> Tensor:
    """The first, the middle and the last crop: upper, middle and lower part of the photograph."""
    return crops[[0, len(crops) // 2, len(crops) - 1]]


def _centre_crop(simulated: Sequence[SimulatedInput], side: int) -> Tensor | None:
    """Centre [3, side, side] of the last simulated input, if it is large enough."""
    if not simulated:
        return None
    picture = simulated[-1].picture.float()
    y, x = ((n - side) // 2 for n in picture.shape[1:])
    return picture[:, y : y + side, x : x + side] if min(y, x) >= 0 else None
