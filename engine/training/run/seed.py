"""First weights from a seed. PyTorch draws them from its one global generator, which is nobody's else to move."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules that are made here draw their weights from `seed`; the global generator is given back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
