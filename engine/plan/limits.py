"""Limits of a render on which both its cost and its run depend."""

from __future__ import annotations

from engine.container import cpu_count

CACHE_BYTES = 32 << 20
"""Bytes of inner tiles held in memory; further ones go to the scratch array beside the output."""

IN_FLIGHT = 2
"""Batches whose pixels are on their way from the device to the disk, while one more is filled."""

SOURCE_ROWS = 64
"""Rows of the base image, or of a picture, that bands read at once."""

WRITERS = (2, 8)
"""Least and largest number of threads that compress and write the shards of an accelerator."""

HALVES_BYTES = 32 << 20
"""Bytes of halved shards that wait in memory for their neighbours, beside an accelerator: a row of them at 16,384 columns."""

_WRITER_BYTES = 256 << 20
"""Bytes of the shards in the hands of more than the least number of writers."""

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


def writers(shard_bytes: int, cores: int | None = None) -> int:
    """Threads that write beside an accelerator. A core compresses about 50 megapixels a second, less than a GPU computes.

    Args:
        shard_bytes: memory that a writer takes.
        cores: processors; by default those of this process. One is left to the device's queue.
    """
    least, most = WRITERS
    spare = (cpu_count() if cores is None else cores) - 1
    return max(least, min(most, spare, _WRITER_BYTES // shard_bytes))
