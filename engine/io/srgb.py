"""Conversion of a picture's samples to opaque sRGB, and the sentences that tell of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import InputError
from engine.io.picture_file import vips
from engine.io.picture_header import SAVE_AS, samples_error

if TYPE_CHECKING:
    import pyvips

_SAMPLES = {"b-w": 1, "grey16": 1, "rgb": 3, "srgb": 3, "rgb16": 3, "labs": 3, "cmyk": 4}
"""Samples a pixel without alpha, by libvips' interpretation."""

_PROFILE = "icc-profile-data"
_PROFILE_SPACES = {1: "GRAY", 3: "RGB ", 4: "CMYK"}
"""Colour space of a fitting ICC profile, by samples a pixel without alpha."""


def check_samples(path: Path, image: pyvips.Image) -> None:
    """Raise InputError unless the samples are 8- or 16-bit grey, RGB, CMYK or CIELAB, the first two with or without alpha."""
    lab = image.interpretation == "labs" and image.format == "short"
    if image.format not in ("uchar", "ushort") and not lab:
        raise samples_error(path, image.format)
    known = _SAMPLES.get(image.interpretation)
    if known is None or image.bands - known not in (0, 1) or image.bands > 4:
        raise InputError(f"{path}: {image.bands} samples a pixel of unknown meaning; {SAVE_AS}")


def notes(image: pyvips.Image) -> Iterator[str]:
    """A sentence about each change of the pixels by ``opaque_srgb`` and by an 8-bit output."""
    if image.format != "uchar":
        bits = image.get("bits-per-sample") if image.get_typeof("bits-per-sample") else 16
        yield f"{bits} bits a sample; the output has 8"
    profile = _profile(image)
    if image.interpretation == "labs":
        yield "CIELAB is converted to sRGB"
    elif image.interpretation == "cmyk":
        origin = f'its ICC profile "{profile}"' if profile else "a generic profile, so colours may differ"
        yield f"CMYK is converted to sRGB by {origin}"
    elif profile and _changes_colours(image):
        yield f'colours are converted to sRGB from the ICC profile "{profile}"'
    if profile is None:
        yield "the ICC profile is damaged or of another kind of colours; it is ignored"
    if image.get_typeof("gainmap-data"):
        yield "the HDR gain map is ignored"
    if image.hasalpha():
        yield "transparency is flattened on white"


def opaque_srgb(image: pyvips.Image) -> pyvips.Image:
    """The image in sRGB of 8 or 16 bits, flattened on white."""
    depth = 8 if image.format == "uchar" else 16
    if image.get_typeof(_PROFILE) and image.interpretation != "labs":
        image = image.icc_transform("srgb", embedded=True, depth=depth)
    else:
        image = image.colourspace("rgb16" if depth == 16 else "srgb")
    return image.flatten(background=white(image)) if image.hasalpha() else image


def white(image: pyvips.Image) -> int:
    """Largest sample of an image in sRGB."""
    return 65535 if image.format == "ushort" else 255


def _profile(image: pyvips.Image) -> str | None:
    """Name of the embedded ICC profile; "" without one, None if libvips cannot use it and takes a built-in one."""
    if not image.get_typeof(_PROFILE):
        return ""
    from PIL import ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.get(_PROFILE)))
        space, name = profile.profile.xcolor_space, profile.profile.profile_description
    except (OSError, UnicodeDecodeError):
        return None
    fits = space == _PROFILE_SPACES[_SAMPLES[image.interpretation]]
    return " ".join((name or "unnamed").split()) if fits else None


def _changes_colours(image: pyvips.Image) -> bool:
    """Whether the embedded profile differs from sRGB by more than a level, on a grid of colours."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    bands = _SAMPLES[image.interpretation]
    grid = np.stack(np.meshgrid(*[steps] * bands), -1).reshape(1, -1, bands)
    plain = vips().Image.new_from_array(grid, interpretation="b-w" if bands == 1 else "srgb")
    tagged = plain.copy()
    tagged.set_type(vips().GValue.blob_type, _PROFILE, image.get(_PROFILE))
    difference = opaque_srgb(tagged).numpy().astype(int) - opaque_srgb(plain).numpy()
    return bool(np.abs(difference).max() > 1)
