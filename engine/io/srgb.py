"""Conversion of a picture's samples to opaque sRGB, and the sentences that tell of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import InputError
from engine.io.icc import name_of, space_of
from engine.io.picture_file import FLOATS, vips
from engine.io.picture_header import SAVE_AS, samples_error

if TYPE_CHECKING:
    import pyvips

SAMPLES = {"b-w": 1, "grey16": 1, "rgb": 3, "srgb": 3, "rgb16": 3, "labs": 3, "cmyk": 4}
"""Samples a pixel without alpha, by libvips' interpretation."""

PROFILE = "icc-profile-data"
"""Entry of a picture's metadata with its ICC profile."""
_PROFILE_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
"""Colour space of a fitting ICC profile, by samples a pixel without alpha."""


def check_samples(path: Path, image: pyvips.Image) -> None:
    """Raise InputError unless the samples are 8- or 16-bit grey, RGB, CMYK or CIELAB, the first two with or without alpha."""
    lab = image.interpretation == "labs" and image.format == "short"
    if image.format not in ("uchar", "ushort") and not lab:
        raise samples_error(path, image.format)
    known = SAMPLES.get(image.interpretation)
    if known is None or image.bands - known not in (0, 1) or image.bands > 4:
        raise InputError(f"{path}: {image.bands} samples a pixel of unknown meaning; {SAVE_AS}")


def notes(image: pyvips.Image) -> Iterator[str]:
    """A sentence about each change of the pixels by ``opaque_srgb`` and by an 8-bit output."""
    profile = profile_name(image)
    if image.format != "uchar":
        yield depth_note(image, 8)
    if image.interpretation in ("labs", "cmyk"):
        yield conversion_note(image, "sRGB")
    elif profile and _changes_colours(image):
        yield f'colours are converted to sRGB from the ICC profile "{profile}"'
    if profile is None:
        yield "the ICC profile is damaged or of another kind of colours; it is ignored"
    if image.get_typeof("gainmap-data"):
        yield "the HDR gain map is ignored"
    if image.hasalpha():
        yield "transparency is flattened on white"


def conversion_note(image: pyvips.Image, target: str) -> str:
    """A sentence about CIELAB or CMYK, which become RGB; ``target`` names its colours."""
    if image.interpretation == "labs":
        return f"CIELAB is converted to {target}"
    profile = profile_name(image)
    origin = f'its ICC profile "{profile}"' if profile else "a generic profile, so colours may differ"
    return f"CMYK is converted to {target} by {origin}"


def depth_note(image: pyvips.Image, depth: int) -> str:
    """A sentence about a change of the depth to ``depth`` bits."""
    if image.get_typeof(FLOATS):
        meaning = "" if image.get_typeof(PROFILE) else ", in sRGB"
        return (
            f"{image.get(FLOATS)}-bit floats are read from 0 (black) to 1 (white){meaning}; the output has {depth} bits"
        )
    bits = image.get("bits-per-sample") if image.get_typeof("bits-per-sample") else 16
    return f"{bits} bits a sample; the output has {depth}"


def opaque_srgb(image: pyvips.Image) -> pyvips.Image:
    """The image in sRGB of 8 or 16 bits, flattened on white."""
    depth = 8 if image.format == "uchar" else 16
    if image.get_typeof(PROFILE) and image.interpretation != "labs":
        image = image.icc_transform("srgb", embedded=True, depth=depth)
    else:
        image = image.colourspace("rgb16" if depth == 16 else "srgb")
    return image.flatten(background=white(image)) if image.hasalpha() else image


def white(image: pyvips.Image) -> int:
    """Largest sample of an image in sRGB."""
    return 65535 if image.format == "ushort" else 255


def profile_name(image: pyvips.Image) -> str | None:
    """Name of the embedded ICC profile; "" without one, None if libvips cannot use it and takes a built-in one."""
    if not image.get_typeof(PROFILE):
        return ""
    profile = bytes(image.get(PROFILE))
    fits = space_of(profile) == _PROFILE_SPACES[SAMPLES[image.interpretation]]
    return name_of(profile) if fits else None


def _changes_colours(image: pyvips.Image) -> bool:
    """Whether the embedded profile differs from sRGB by more than a level, on a grid of colours."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    bands = SAMPLES[image.interpretation]
    grid = np.stack(np.meshgrid(*[steps] * bands), -1).reshape(1, -1, bands)
    plain = vips().Image.new_from_array(grid, interpretation="b-w" if bands == 1 else "srgb")
    tagged = plain.copy()
    tagged.set_type(vips().GValue.blob_type, PROFILE, image.get(PROFILE))
    difference = opaque_srgb(tagged).numpy().astype(int) - opaque_srgb(plain).numpy()
    return bool(np.abs(difference).max() > 1)
