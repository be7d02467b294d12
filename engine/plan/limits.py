"""Limits of a render on which both its cost and its run depend."""

CACHE_BYTES = 32 << 20
"""Bytes of inner tiles held in memory; further ones go to the scratch array beside the output."""

IN_FLIGHT = 2
"""Batches whose pixels are on their way from the device to the disk, while one more is filled."""

WRITERS = 2
"""Threads that compress and write the tiles of batches."""


def cache_share(stages: int) -> int:
    """Bytes that the cache of one stage may hold."""
    return CACHE_BYTES // stages
