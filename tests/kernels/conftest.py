"""Fixtures for the kernels: Triton's interpreter, and memory that is never clean by luck."""

import os

# Before anything imports Triton, which decides at its own import. tests/conftest.py must say the same for a run of
# all tests, because other folders import the kernels before this file is read.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from support.kernels import poison  # noqa: E402

from engine.kernels import blend, gather, trim  # noqa: E402


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch):
    """Poison the result of ``torch.empty`` and its relatives, so that an element that a kernel leaves out shows."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        clean = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _clean=clean, **options: poison(_clean(*args, **options)))


@pytest.fixture
def small_blocks(monkeypatch):
    """Many programs, as on a GPU; the interpreter's own blocks would hold a test's whole image."""
    for module in (blend, gather, trim):
        monkeypatch.setattr(
            module, "block_and_grid", lambda height, width, *_: ((4, 16), (-(-width // 16), -(-height // 4)))
        )
