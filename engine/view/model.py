"""What the viewer asks of a model that computes what is looked at; ``engine.explore`` is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from engine.geometry import Box
from engine.growing import Pixels
from engine.io.objects import Place


class ModelSource(Protocol):
    """A model whose images are computed where they are looked at. Methods may be called from any thread, and do not wait."""

    on_change: Callable[[], None]
    """Called after every change, from another thread."""

    @property
    def canvas(self) -> tuple[int, Place] | None:
        """Number and folder of the store that grows where it is looked at; None while there is none."""
        ...

    @property
    def look(self) -> Pixels | None:
        """A small image of the whole, better than the one that the store holds; None while there is none."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """State for the page, as JSON: see ``ModelState`` in viewer/src/api.ts."""
        ...

    def sample(self, sheet: int, seed: int) -> Pixels | None:
        """A sample of a seed, if it is there."""
        ...

    def want_samples(self, first: int, count: int) -> None:
        """Compute samples of these seeds, and of no others."""
        ...

    def open(self, seed: int | None, size: str | None, gain: float | None) -> None:
        """Go to the image of a seed, or to samples, of a size and a noise gain; None: the present ones. Raises UsageError."""
        ...

    def want_crop(self, gain: float, x: int, y: int) -> None:
        """Compute a small part about a pixel with a noise gain, and no other. Raises UsageError."""
        ...

    def crop(self, number: int) -> Pixels | None:
        """The crop of this number, if it is the last one."""
        ...

    def view(self, box: Box | None) -> None:
        """Compute this part of the image, and no other."""
        ...

    def render(self, *, is_wanted: bool) -> None:
        """Compute the whole image after that, or stop it."""
        ...
