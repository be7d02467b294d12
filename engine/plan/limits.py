"""Limits of a render on which both its cost and its run depend."""

CACHE_BYTES = 32 << 20
"""Bytes of inner tiles held in memory; further ones go to the scratch array beside the output."""

IN_FLIGHT = 2
"""Batches whose pixels are on their way from the device to the disk, while one more is filled."""

WRITERS = 2
"""Threads that compress and write the tiles of batches."""


SATURATING = 1 << 17
"""LR pixels that occupy a large GPU, where its properties are not known."""

_BLOCK, _ROUNDS, _LEAST_ROUNDS = 128, 8, 4
"""Pixels of a kernel's block; blocks that a multiprocessor computes one after the other, many so that the last ones, which
leave others idle, count little; and the least number."""

_DENSE_BYTES = 192 * 2
"""Bytes of a pixel's maps in a dense block in half precision, which are read over and over: they should stay in the cache."""


def saturating_pixels(multiprocessors: int, cache: int) -> int:
    """LR pixels to which small tiles are batched, forecast from a GPU's multiprocessors and bytes of second-level cache."""
    rounds = cache // (_DENSE_BYTES * _BLOCK * multiprocessors)
    return multiprocessors * _BLOCK * min(_ROUNDS, max(_LEAST_ROUNDS, rounds))


def cache_share(stages: int) -> int:
    """Bytes that the cache of one stage may hold."""
    return CACHE_BYTES // stages
