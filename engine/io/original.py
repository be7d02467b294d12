"""A picture with its own depth, channels and colours, as networks enlarge it.

Networks see the values of the file: those of its ICC profile, which the result carries on. Grey is seen as three equal
channels. Colours of transparent pixels are filled from the visible ones (``engine.io.transparency``), and alpha is read apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.geometry import Box, repeated
from engine.io.icc import LARGEST, digest_of, load_profile, name_of
from engine.io.photo import PictureSource, pages_note, resampled
from engine.io.picture_file import (
    FLOATS,
    Header,
    check_exists,
    decoding,
    dpi_of,
    integers,
    open_header,
    open_upright,
    vips,
)
from engine.io.srgb import PROFILE, SAMPLES, check_samples, conversion_note, depth_note, profile_name, white
from engine.io.transparency import REACH, filled
from engine.pixels import PixelFormat

if TYPE_CHECKING:
    import pyvips

Samples = np.ndarray[Any, np.dtype[Any]]

_LOOKED_AT = 256
"""Side of the middle of a float picture that is looked at when it is opened."""


class OriginalPicture(PictureSource):
    """A picture that is read region by region in its own colours, as float32 [3, h, w] in [0, 1].

    Args:
        path: a picture of 8 or 16 bits or of floats; docs/input.md lists the formats.
        size: (height, width) to resample to; None keeps the picture's own size.
        depth: bits of the result's samples; None for the picture's own, which is 16 for floats.
        profile: name or file of the RGB profile to convert to; None keeps the picture's own.
        wraps: whether the picture repeats along (rows, columns), which decides what lies beside transparent pixels.

    Attributes:
        pixels: channels and depth of the result.
        profile: ICC profile of the result; None for sRGB, and for grey without a profile.
        dpi: (horizontal, vertical) resolution in dots per inch; None where the file records none.

    Others are those of ``PictureSource``.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int] | None = None,
        *,
        depth: int | None = None,
        profile: str | Path | None = None,
        wraps: tuple[bool, bool] = (False, False),
    ) -> None:
        self._depth, self._wanted, self._wraps = depth, profile, wraps
        self._target = None if profile is None else load_profile(profile)
        super().__init__(path, size)
        if self._is_float and self.is_light:
            self.sample(_LOOKED_AT)  # refuses most pictures of another white here

    @property
    def profile_digest(self) -> str | None:
        """SHA-256 of ``profile``."""
        return None if self.profile is None else digest_of(self.profile)

    @property
    def alpha(self) -> Alpha | None:
        """Alpha at the size of the picture; None if it is opaque."""
        return Alpha(self) if self.pixels.has_alpha else None

    @property
    def bytes_read(self) -> int:
        """Upper bound of the bytes of a pixel while it is read: its samples twice, and three float32."""
        return self.pixels.channels * (1 if self._white == 255 else 2) * 2 + 12

    def resampled(self, size: tuple[int, int]) -> OriginalPicture:
        """The same picture at another size, (height, width)."""
        return OriginalPicture(self.path, size, depth=self._depth, profile=self._wanted, wraps=self._wraps)

    def read(self, box: Box) -> Tensor:
        """Colours of a box, float32 [3, h, w]. Raises InputError for damage, and for floats beyond white."""
        with decoding(self.path):
            self._check_floats(box)
            return self._colours(self._opaque(box))

    def _opaque(self, box: Box) -> Samples:
        """Samples of a box without alpha, [h, w, C], with the colours of transparent pixels filled."""
        if not self.pixels.has_alpha:
            return self._samples(box)
        (height, width), (y, x) = self.size, (REACH * wraps for wraps in self._wraps)
        return filled(self._plane, box, Box(-y, -x, height + y, width + x))

    def _plane(self, box: Box) -> Samples:
        """Samples of a box that may lie beyond the sides of a picture that repeats."""
        if box == box.clip(Box(0, 0, *self.size)):
            return self._samples(box)
        rows, columns = (n * wraps for n, wraps in zip(self.size, self._wraps, strict=True))
        parts = [
            np.concatenate([self._samples(Box(y0, x0, y1, x1)) for x0, x1 in repeated(box.x0, box.x1, columns)], 1)
            for y0, y1 in repeated(box.y0, box.y1, rows)
        ]
        return np.concatenate(parts)

    def _samples(self, box: Box) -> Samples:
        """Samples of a box with alpha, uint8 or uint16 [h, w, C]."""
        image = self._image.crop(box.x0, box.y0, box.width, box.height)
        samples: Samples = image.numpy().reshape(box.height, box.width, image.bands)
        return samples

    def alpha_of(self, box: Box) -> Tensor:
        """Alpha of a box, float32 [1, h, w] in [0, 1]."""
        with decoding(self.path):
            image = self._image.crop(box.x0, box.y0, box.width, box.height)[self.pixels.colours]
            values = image.numpy().reshape(1, box.height, box.width).astype(np.float32)
        values /= self._white
        return torch.from_numpy(values)

    @cached_property
    def _raw(self) -> pyvips.Image:
        return open_upright(self.path, raw=True)

    @cached_property
    def _image(self) -> pyvips.Image:
        image = self._converted(integers(self._raw))
        return image if self.size == self._own_size else self._at_size(image)

    def _prepare(self, header: Header) -> None:
        image = header.image
        self.pixels = _format(image, self._depth, is_converted=self._target is not None)
        self.profile = self._target if self._target is not None else _kept_profile(image)
        self.dpi = dpi_of(image)
        self.notes = (*pages_note(header), *self._changes(image))
        self._is_float = bool(image.get_typeof(FLOATS))
        self._white = np.float32(white(self._converted(image)))

    def _changes(self, image: pyvips.Image) -> Iterator[str]:
        """A sentence about each change of the samples."""
        if image.get_typeof(FLOATS) or self.pixels.depth < _own_depth(image):
            yield depth_note(image, self.pixels.depth)
        own = profile_name(image)
        if image.interpretation in ("labs", "cmyk"):
            yield conversion_note(image, self._target_name)
        elif self._target is not None and _converts(image, self._target):
            origin = f'"{own}"' if own else "sRGB"
            yield f"colours are converted from {origin} to {self._target_name}"
        if self._target is not None and SAMPLES[image.interpretation] == 1:
            yield f"grey becomes RGB in {self._target_name}"
        if own is None:
            yield "the ICC profile is damaged or of another kind of colours; it is ignored"
        elif image.get_typeof(PROFILE) and len(image.get(PROFILE)) > LARGEST:
            yield f"the ICC profile is larger than {LARGEST >> 20} MiB; it is ignored"
        if image.get_typeof("gainmap-data"):
            yield "the HDR gain map is ignored"

    @property
    def _target_name(self) -> str:
        return "sRGB" if self._target is None else f'"{name_of(self._target)}"'

    def _converted(self, image: pyvips.Image) -> pyvips.Image:
        """The samples that are read: colours, and alpha last."""
        bands = SAMPLES[image.interpretation]
        colours = image.extract_band(0, n=bands)
        if image.interpretation in ("labs", "cmyk") or (self._target is not None and _converts(image, self._target)):
            colours = _transformed(colours, self._target)
        elif bands == 1 and self._target is not None:
            colours = colours.bandjoin([colours, colours])
        deep = colours.format == "ushort"
        if image.bands > bands:
            alpha = image.extract_band(bands)
            colours = colours.bandjoin((alpha * 257).cast("ushort") if deep and image.format == "uchar" else alpha)
        grey, rgb = ("grey16", "rgb16") if deep else ("b-w", "srgb")
        return colours.copy(interpretation=grey if colours.bands < 3 else rgb)

    def _at_size(self, image: pyvips.Image) -> pyvips.Image:
        """The image at ``size``; by premultiplied colours, so that transparent ones do not bleed."""
        if not self.pixels.has_alpha:
            return resampled(image, *self.size)
        largest = {"max_alpha": white(image)}
        return resampled(image.premultiply(**largest), *self.size).unpremultiply(**largest).rint().cast(image.format)

    def _tensor(self, image: pyvips.Image) -> Tensor:
        samples: Samples = image.numpy().reshape(image.height, image.width, image.bands)
        return self._colours(samples[..., : self.pixels.colours])

    def _colours(self, samples: Samples) -> Tensor:
        """float32 [3, h, w] of samples without alpha."""
        values = samples.astype(np.float32)
        values /= self._white
        planes = torch.from_numpy(values).permute(2, 0, 1)
        return planes.expand(3, -1, -1)

    def _check_floats(self, box: Box) -> None:
        """Raise InputError where floats are NaN or most of them lie beyond white: a file does not say what its white is."""
        if not self._is_float or self.size != self._own_size:
            return
        values = self._raw.crop(box.x0, box.y0, box.width, box.height).numpy()
        where = f"{self.path}: x {box.x0} to {box.x1}, y {box.y0} to {box.y1}"
        if np.isnan(values).any():
            raise InputError(f"{where}: NaN among its samples; repair the picture, or save it as 16 bits")
        if 2 * np.count_nonzero(values > 1) > values.size:
            raise InputError(
                f"{where}: most floats are beyond white (up to {values.max():g}, white is 1); scale the picture, or save it as "
                "16 bits"
            )


def size_and_pixels(path: Path, depth: int | None, profile: str | Path | None) -> tuple[tuple[int, int], PixelFormat]:
    """(height, width) of the upright picture and the format of its result, from its header.

    Args:
        path, depth, profile: as for ``OriginalPicture``.

    Raises:
        InputError: what the header shows of the errors of ``PictureSource``.
    """
    check_exists(path, "picture")
    with decoding(path):
        image = open_header(path).image
        check_samples(path, image)
        return (image.height, image.width), _format(image, depth, is_converted=profile is not None)


def _format(image: pyvips.Image, depth: int | None, *, is_converted: bool) -> PixelFormat:
    """Format of a picture's result; ``is_converted``: to a profile of RGB."""
    colours = 1 if SAMPLES[image.interpretation] == 1 and not is_converted else 3
    return PixelFormat(colours + int(image.hasalpha()), depth or _own_depth(image))


def _own_depth(image: pyvips.Image) -> int:
    return 8 if image.format == "uchar" else 16


class Alpha:
    """Alpha of a picture, as a source of float32 [1, h, w]."""

    def __init__(self, picture: OriginalPicture) -> None:
        self._picture = picture
        self.size = picture.size

    def read(self, box: Box) -> Tensor:
        """Alpha of ``box``, which lies inside the picture."""
        return self._picture.alpha_of(box)


def _kept_profile(image: pyvips.Image) -> bytes | None:
    """The picture's own profile, if it is of its colours."""
    if image.interpretation in ("labs", "cmyk") or not profile_name(image):
        return None
    profile = bytes(image.get(PROFILE))
    return profile if len(profile) <= LARGEST else None


def _converts(image: pyvips.Image, target: bytes) -> bool:
    """Whether grey or RGB changes its values on the way to a profile."""
    own = _kept_profile(image)
    return (own or load_profile("srgb")) != target


def _transformed(image: pyvips.Image, target: bytes | None) -> pyvips.Image:
    """16-bit RGB in a profile, None for sRGB, by relative colorimetry."""
    if image.interpretation == "labs":
        image, fits = image.colourspace("rgb16"), False
        if target is None:
            return image
    else:
        fits = bool(profile_name(image)) and len(image.get(PROFILE)) <= LARGEST
    if not fits and SAMPLES[image.interpretation] == 1:
        image = image.colourspace("rgb16" if image.format == "ushort" else "srgb")
    name = "cmyk" if image.interpretation == "cmyk" else "srgb"
    connected = image.icc_import(intent="relative", embedded=fits, input_profile=name).copy()
    connected.set_type(vips().GValue.blob_type, PROFILE, target or load_profile("srgb"))
    return connected.icc_export(intent="relative", depth=16)
