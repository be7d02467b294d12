"""machine_code: what ptxas made of a kernel: registers, spills, instructions. Needs Triton's own tools and no GPU."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from engine.kernels.launch import triton

TENSOR_CORE = ("HMMA", "HGMMA")
"""Instructions of the tensor cores for half precision: compute capability 8 and 12, and 9.0."""

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", re.MULTILINE)


class Resources(NamedTuple):
    """Resources of a thread or a program."""

    registers: int
    """Registers of a thread."""

    stack: int
    """Bytes of a thread's stack, which holds the registers that are spilled. It is memory of the device, for all threads."""


def resources(cubin: bytes) -> Resources:
    """Resources of a compiled kernel. Raises OSError or CalledProcessError where Triton's tools are missing."""
    # The last line is that of the kernel: REG:24 STACK:0 SHARED:0 LOCAL:0 ...
    words = (word.split(":") for word in _run("cuobjdump", cubin, "--dump-resource-usage").splitlines()[-1].split())
    usage = {word[0]: int(word[1]) for word in words if len(word) == 2 and word[1].isdecimal()}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"])


def instructions(cubin: bytes) -> Counter[str]:
    """Number of instructions of a compiled kernel by name, without modifiers. Raises as ``resources`` does."""
    return Counter(_INSTRUCTION.findall(_run("nvdisasm", cubin, "-c")))


def _run(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:  # an open temporary file cannot be read by others on Windows
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([_tools() / tool, *options, path], capture_output=True, text=True, check=True).stdout


@functools.cache
def _tools() -> Path:
    if triton is None:
        raise FileNotFoundError("no Triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
