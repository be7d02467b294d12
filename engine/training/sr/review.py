"""How good a network is now: numbers on a strip that was never trained on, and a picture to look at.

The numbers are PSNR and the sliced Wasserstein distance of patches: the first falls and the second improves when a
network begins to draw texture, and neither alone says enough. Draws nothing from the run's generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.archs.layers import RGB
from engine.training.losses.texture import SlicedWasserstein
from engine.training.photo import Picture, to_unit, write_row
from engine.training.sr.chain import ChainPicture
from engine.training.sr.pairs import Enlarge

MOST_CROPS, LEAST_SIDE, MOST_SIDE = 8, 16, 256
SEED = 1


@dataclass(frozen=True, slots=True)
class Quality:
    """PSNR in dB (higher is better) and texture distance in units of 1.0 (lower is better)."""

    psnr: float
    texture: float


class Review:
    """Fixed crops: `hr` [N, 3, H, W] in [0, 1] is the truth, `lr` its reduction; `sigma` and `noise_channels`: the input
    noise of a render.

    `held_out`: whether the crops were never trained on; otherwise they are for the eye only.
    """

    def __init__(
        self,
        hr: Tensor,
        lr: Tensor,
        sigma: float,
        noise_channels: int,
        held_out: bool,
        chain: Sequence[ChainPicture] = (),
    ) -> None:
        self.hr, self.lr, self.held_out = hr, lr, held_out
        self.scale = hr.shape[2] // lr.shape[2]
        shape = (lr.shape[0], RGB + noise_channels, *lr.shape[2:])
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        self.noise[:, :RGB] *= sigma
        self.chain = _middle(chain, lr.shape[2])
        self._start: Tensor | None = None

    def inputs(self, *, noise: bool) -> Tensor:
        """What a network takes to make the crops."""
        return self._with_noise(self.lr, noise)

    def quality(self, enlarge: Enlarge, *, noise: bool) -> Quality:
        return self._measure(enlarge(self.inputs(noise=noise)))

    def bicubic(self) -> Quality:
        return self._measure(self._enlarged(self.lr))

    def keep_start(self, enlarge: Enlarge) -> None:
        """Remember what the network made before training, to show beside what it makes later."""
        self._start = self._show(enlarge, noise=False)

    def write(self, enlarge: Enlarge, path: Path) -> None:
        """Rows of pictures: the input enlarged bicubically, the start, now (with the input noise of a render), the
        photograph; the last row is a chain input, of which there is no photograph (its input is shown again).
        """
        last = [] if self.chain is None else [self._enlarged(self.chain[None])]
        now = self._show(enlarge, noise=True)
        columns = [
            torch.cat([self._enlarged(self._shown(self.lr)), *last]),
            self._start if self._start is not None else now,
            now,
            torch.cat([self._shown(self.hr), *last]),
        ]
        write_row([torch.cat(list(column), 1) for column in columns], path)

    def _show(self, enlarge: Enlarge, *, noise: bool) -> Tensor:
        rows = self._shown(self.lr)
        if self.chain is not None:
            rows = torch.cat([rows, self.chain[None]])
        return enlarge(self._with_noise(rows, noise))

    def _with_noise(self, pictures: Tensor, noise: bool) -> Tensor:
        """[n, 3, h, w] -> [n, 3 + noise channels, h, w]; without `noise` its numbers are all zero."""
        values = noise * self.noise[torch.arange(len(pictures)) % len(self.noise)]
        return torch.cat([pictures + values[:, :RGB], values[:, RGB:]], 1)

    @staticmethod
    def _shown(crops: Tensor) -> Tensor:
        """Three of the crops: of the upper, the middle and the lower part."""
        return crops[[0, len(crops) // 2, len(crops) - 1]]

    def _enlarged(self, lr: Tensor) -> Tensor:
        return F.interpolate(lr, scale_factor=self.scale, mode="bicubic", align_corners=False).clamp(0, 1)

    def _measure(self, pictures: Tensor) -> Quality:
        errors = (pictures - self.hr).square().mean((1, 2, 3)).clamp_min(1e-10)
        psnr = float((-10 * errors.log10()).mean())
        distance = SlicedWasserstein()(pictures, self.hr, torch.Generator().manual_seed(SEED))
        return Quality(psnr, float(distance))


def fixed_crops(photo: Picture, trained: int, grid: int) -> tuple[Tensor, bool]:
    """Up to eight crops [N, 3, side, side] in [0, 1] from top to bottom, and whether they lie in columns that are not
    trained on; the side is a multiple of `grid`.
    """
    height, width = photo.size
    held_out = width - trained >= max(grid, LEAST_SIDE)
    left = trained if held_out else 0
    side = min(MOST_SIDE, height, width - left) // grid * grid
    count = min(MOST_CROPS, height // side)
    shares = [i / max(1, count - 1) for i in range(count)]
    places = [(round(s * (height - side)), left if held_out else round(s * (width - side))) for s in shares]
    return to_unit(torch.stack([photo.crop(y, x, side, side) for y, x in places])), held_out


def _middle(chain: Sequence[ChainPicture], side: int) -> Tensor | None:
    if not chain:
        return None
    picture = chain[-1].picture.float()
    y, x = ((n - side) // 2 for n in picture.shape[1:])
    return picture[:, y : y + side, x : x + side] if min(y, x) >= 0 else None
