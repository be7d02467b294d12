"""Bytes that autograd saves for the backward passes of a computation, counted by its own hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def peak_saved_bytes(run: Callable[[], object], weights: Iterable[Tensor] = ()) -> int:
    """Largest sum of the tensors that autograd holds at one time while ``run`` computes.

    Args:
        run: a forward pass, or a whole iteration with its backward passes.
        weights: tensors that are not counted.
    """
    count = _Count({weight.untyped_storage().data_ptr() for weight in weights})
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(count, tensor), lambda saved: saved.tensor):
        run()
    return count.peak


class _Count:
    """Bytes of all storages that are saved now, and their peak."""

    def __init__(self, excluded: set[int]) -> None:
        self.peak = self._now = 0
        self._excluded = excluded
        self._users: dict[int, int] = {}

    def add(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        users = self._users.get(address, 0)
        self._users[address] = users + 1
        if not users and address not in self._excluded:
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)

    def remove(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        self._users[address] -= 1
        if not self._users[address] and address not in self._excluded:
            self._now -= storage.nbytes()


class _Saved:
    """A saved tensor; autograd drops it with the graph."""

    def __init__(self, count: _Count, tensor: Tensor) -> None:
        self.tensor = tensor
        self._count, self._storage = count, tensor.untyped_storage()
        count.add(self._storage)

    def __del__(self) -> None:
        self._count.remove(self._storage)
