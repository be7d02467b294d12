"""Published figures of GPUs, from the vendor's architecture white papers and data sheets. None was measured here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UsageError, option

CONTEXT = 600 << 20
"""Bytes of a CUDA context with the code of its libraries: an assumption, between the 430 and 600 MiB that others report."""

KERNELS = (8, 0)
"""Oldest compute capability that the engine's Triton kernels run on."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Ceilings of a GPU, at its boost clock."""

    name: str
    half: float
    """TFLOP/s of dense matrix products in fp16 that add in float32: on GeForce half of the advertised rate."""
    single: float
    """TFLOP/s in float32, without tensor cores."""
    bandwidth: float
    """GB/s of the memory."""
    memory: float
    """GiB of the memory."""
    cache: int
    """MiB of the second-level cache."""
    multiprocessors: int
    capability: tuple[int, int]
    """Compute capability."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory."""
        return int(self.memory * (1 << 30))

    @property
    def runs_kernels(self) -> bool:
        """Whether the engine's Triton kernels run on it."""
        return self.capability >= KERNELS


GPUS = {
    key: Gpu(*values)
    for key, values in {
        "rtx-3060": ("RTX 3060", 25.6, 12.7, 360, 12, 3, 28, (8, 6)),
        "rtx-3060-8gb": ("RTX 3060 8 GB", 25.6, 12.7, 240, 8, 2, 28, (8, 6)),
        "rtx-3090": ("RTX 3090", 71.0, 35.6, 936, 24, 6, 82, (8, 6)),
        "rtx-4060": ("RTX 4060", 30.2, 15.1, 272, 8, 24, 24, (8, 9)),
        "rtx-4070": ("RTX 4070", 58.3, 29.1, 504, 12, 36, 46, (8, 9)),
        "rtx-4080": ("RTX 4080", 97.5, 48.7, 717, 16, 64, 76, (8, 9)),
        "rtx-4090": ("RTX 4090", 165.2, 82.6, 1008, 24, 72, 128, (8, 9)),
        "rtx-5070": ("RTX 5070", 61.7, 30.9, 672, 12, 48, 48, (12, 0)),
        "rtx-5080": ("RTX 5080", 112.6, 56.3, 960, 16, 64, 84, (12, 0)),
        "rtx-5090": ("RTX 5090", 209.5, 104.8, 1792, 32, 96, 170, (12, 0)),
        "t4": ("T4", 65.1, 8.1, 320, 15, 4, 40, (7, 5)),
        "l4": ("L4", 121.0, 30.3, 300, 22.5, 48, 58, (8, 9)),
        "a100": ("A100 80 GB", 312.0, 19.5, 2039, 80, 40, 108, (8, 0)),
        "h100": ("H100 SXM", 989.4, 66.9, 3350, 80, 50, 132, (9, 0)),
        "h200": ("H200", 989.4, 66.9, 4800, 141, 50, 132, (9, 0)),
    }.items()
}
"""GPUs by the name that the command line takes."""


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, in any case and with or without hyphens.

    Raises:
        UsageError: the table does not hold it.
    """
    plain = {key.replace("-", ""): gpu for key, gpu in GPUS.items()}
    found = plain.get("".join(letter for letter in name.lower() if letter.isalnum()))
    if found is None:
        raise UsageError(f"{option('gpu', name)}: no published figures of it here; use one of {', '.join(GPUS)}")
    return found
