"""Sides of rectangles: their stored form, those of shards and chunks, and those of a pyramid's levels."""

from __future__ import annotations

Sides = tuple[int, int]
"""(height, width) of a rectangle, in pixels."""

MAX_SHARD = 2048
"""Largest side of a shard in pixels: three channels of 8 bits decode in about 12 MiB, which viewers handle well."""

MAX_CHUNK = 512
"""Largest side of an inner chunk in pixels: the unit of a partial read, and the usual tile size of viewers."""

REDUCED_SHARD, REDUCED_CHUNK = 1024, 512
"""Sides in pixels of the shards and chunks of an image that is made from float32: reduced, or not in 8-bit RGB."""

_MIN_SHARD = 256
_MIN_CHUNK = 64


def stored_sides(sides: Sides) -> int | list[int]:
    """The stored form of a rectangle: the side of a square, as earlier versions had only squares, else [height, width]."""
    return sides[0] if sides[0] == sides[1] else list(sides)


def sides_of(stored: object) -> Sides:
    """(height, width) of a stored rectangle. Raises ValueError when it is none."""
    sides = [stored, stored] if type(stored) is int else stored
    if not (isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
        raise ValueError(f"{stored!r} is neither a side nor a height and a width")
    return sides[0], sides[1]


def pyramid_of(size: Sides, chunk: Sides) -> tuple[Sides, ...]:
    """Sizes (height, width) of the levels below ``size``, as ``Plan.pyramid`` has them."""
    sizes = [size]
    while sizes[-1][0] > chunk[0] or sizes[-1][1] > chunk[1]:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return tuple(sizes)


def shards_of(tile: Sides) -> tuple[Sides, Sides]:
    """(height, width) of (shard, chunk) for tiles of these output pixels."""
    rows, columns = (shard_of(side) for side in tile)
    return (rows[0], columns[0]), (rows[1], columns[1])


def shard_of(tile: int, largest: int = MAX_SHARD) -> tuple[int, int]:
    """Sides (shard, chunk) in pixels for a side of ``tile`` output pixels: a shard divides the tile, a chunk the shard.

    A shard is even, so that its half in the pyramid lies on whole pixels. A tile without a divisor of a useful size is one
    shard; a shard without one is one chunk.
    """
    shard = next((d for d in range(min(tile, largest), _MIN_SHARD - 1, -1) if tile % d == 0 and d % 2 == 0), tile)
    chunk = next((d for d in range(min(shard, MAX_CHUNK), _MIN_CHUNK - 1, -1) if shard % d == 0), shard)
    return shard, chunk
