"""Format of the pixels of a store: channels, depth, and names of colours. Holds no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEPTHS = (8, 16)
"""Bits of a sample in a store."""

PROFILES = ("srgb", "adobe-rgb", "p3")
"""ICC profiles that have a name."""

_NAMES = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGB with alpha"}


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """Channels and depth of an image."""

    channels: int = 3
    """1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha. Colours are not multiplied by alpha."""
    depth: int = 8
    """Bits of a sample: 8 or 16."""

    def __post_init__(self) -> None:
        if self.channels not in _NAMES or self.depth not in DEPTHS:
            raise ValueError(f"no format of pixels: {self.channels} channels of {self.depth} bits")

    def __str__(self) -> str:
        return f"{self.depth}-bit {_NAMES[self.channels]}"

    @property
    def is_plain(self) -> bool:
        """Whether the last network's output becomes these pixels by rounding alone."""
        return (self.channels, self.depth) == (3, 8)

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is alpha."""
        return self.channels in (2, 4)

    @property
    def colours(self) -> int:
        """Channels without alpha: 1 or 3."""
        return self.channels - self.has_alpha

    @property
    def bytes(self) -> int:
        """Bytes of a pixel."""
        return self.channels * self.depth // 8

    @property
    def white(self) -> int:
        """Largest sample."""
        return (1 << self.depth) - 1

    @property
    def dtype(self) -> Literal["uint8", "uint16"]:
        """Name of numpy's type of a sample."""
        return "uint8" if self.depth == 8 else "uint16"

    def to_json(self) -> dict[str, int]:
        """Keys of a stored plan; none for 8-bit RGB, which earlier versions had alone."""
        return {} if self.is_plain else {"channels": self.channels, "depth": self.depth}


PLAIN = PixelFormat()
"""8-bit RGB."""


def pixels_of(stored: Mapping[str, Any]) -> PixelFormat:
    """Format of a stored plan. Raises ValueError where it is damaged."""
    return PixelFormat(stored.get("channels", PLAIN.channels), stored.get("depth", PLAIN.depth))
