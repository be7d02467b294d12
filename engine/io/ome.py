"""OME-Zarr 0.5 metadata of a pyramid, built and validated by yaozarrs."""

from __future__ import annotations

from typing import Any

from yaozarrs import v05

from engine.pixels import PLAIN, PixelFormat

AXES = ("c", "y", "x")
_GREY, _ALPHA = ("grey", "FFFFFF"), ("alpha", "FFFFFF")
_COLOURS = {1: (_GREY,), 3: (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))}
"""(label, colour) of the channels of grey and RGB."""


def image_metadata(name: str, levels: int, origin: tuple[int, int], pixels: PixelFormat = PLAIN) -> dict[str, Any]:
    """The ``ome`` attribute of a group with the arrays "0", "1", ...

    Args:
        name: name of the image.
        levels: number of arrays; each halves the one before.
        origin: (y, x) of the image's corner in pixels of the whole canvas; not zero for a region of interest.
        pixels: channels and depth. Alpha is a channel that viewers do not show by themselves.

    Scales are exact powers of two. A pixel of level i is the average of 2**i x 2**i pixels, so its centre is shifted by
    (2**i - 1) / 2.
    """
    datasets = [
        v05.Dataset(
            path=str(level),
            coordinateTransformations=[
                v05.ScaleTransformation(scale=[1.0, 2.0**level, 2.0**level]),
                v05.TranslationTransformation(translation=[0.0, *(o + (2**level - 1) / 2 for o in origin)]),
            ],
        )
        for level in range(levels)
    ]
    axes: list[Any] = [v05.ChannelAxis(name="c"), v05.SpaceAxis(name="y"), v05.SpaceAxis(name="x")]
    channels = [
        v05.OmeroChannel(
            label=label,
            color=colour,
            window=v05.OmeroWindow(start=0, end=pixels.white, min=0, max=pixels.white),
            active=label != "alpha",
        )
        for label, colour in (*_COLOURS[pixels.colours], *((_ALPHA,) if pixels.has_alpha else ()))
    ]
    image = v05.Image(
        multiscales=[v05.Multiscale(name=name, axes=axes, datasets=datasets)], omero=v05.Omero(channels=channels)
    )
    return image.model_dump(mode="json", exclude_none=True)
