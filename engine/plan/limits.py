"""Limits of a render that both its cost and its run depend on."""

from __future__ import annotations

CACHE_BYTES = 32 << 20
"""Inner tiles held in memory; what does not fit goes to the scratch array beside the output."""


IN_FLIGHT = 2
"""Batches of the executor stream whose pixels are on their way from the device to the disk; one more is being filled."""


WRITERS = 2
"""Threads of the executor stream that compress and write."""


def cache_share(stages: int) -> int:
    """Bytes that one level's cache may hold."""
    return CACHE_BYTES // stages
