"""machine_code: a launch compiled without a GPU, and what ptxas made of it: registers, spills, instructions.

Needs Triton, which brings NVIDIA's tools, and no interpreter (``TRITON_INTERPRET=0`` on a machine without CUDA).
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.launch import triton

ARCHITECTURES = (80, 86, 89, 90, 120)
"""Compute capabilities times 10 for which all kernels compile without spills: A100, RTX 30, RTX 40, H100, RTX 50."""

TENSOR_CORE = ("HMMA", "HGMMA")
"""Instructions of the tensor cores for half precision; HGMMA is that of compute capability 9.0."""

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)(?:.*`\((\.L_\w+)\))?")
_LABEL = re.compile(r"^(\.L_\w+):")


class Signature(NamedTuple):
    """Everything of a launch that its machine code depends on, as JSON can hold it."""

    types: dict[str, str]
    """Argument -> Triton's type; the suffix ":16" promises divisibility by 16."""

    constants: dict[str, Any]
    """Argument -> value that is compiled in."""

    options: dict[str, Any]
    """Options of the compiler, such as num_warps."""


def signature(kernel: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Signature:  # noqa: ANN401
    """As Triton specialises a launch: an integer 1 is a constant and divisibility by 16 is known, unless excluded."""
    types, constants = {}, {}
    # A kernel that is interpreted keeps the arguments of its decorator.
    excluded = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, Tensor):
            types[name] = _TYPES[value.dtype] + ":16" * (value.data_ptr() % 16 == 0)
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1 and name not in excluded:
            constants[name] = 1
        else:
            divisible = value % 16 == 0 and name not in excluded
            types[name] = ("i32" if abs(value) < 2**31 else "i64") + ":16" * divisible
    constants |= {name: value for name, value in options.items() if name in kernel.arg_names}
    return Signature(types, constants, {k: v for k, v in options.items() if k not in kernel.arg_names})


def compile_for(kernel: Any, signature: Signature, architecture: int) -> Any:  # noqa: ANN401
    """Triton's compiled kernel, with ``asm["cubin"]``, ``asm["ptx"]`` and ``metadata.shared``."""
    from triton.backends.compiler import GPUTarget

    types, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        types[name], _, divisor = signature.types.get(name, "constexpr").partition(":")
        if divisor:
            attributes[(index,)] = [["tt.divisibility", int(divisor)]]
    source = triton.compiler.ASTSource(kernel, types, signature.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=signature.options)


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


class Code(NamedTuple):
    """Instructions of a kernel by name, without modifiers."""

    all: Counter[str]
    """All instructions, as they stand."""

    loop: Counter[str]
    """Instructions of the innermost loop with most tensor-core instructions; all instructions if no loop has any."""


def code(cubin: bytes) -> Code:
    """Instructions of a compiled kernel. Raises as ``resources`` does."""
    names: list[str] = []
    starts: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in _run("nvdisasm", cubin, "-c").splitlines():
        if label := _LABEL.match(line):
            starts[label[1]] = len(names)
        elif found := _INSTRUCTION.match(line):
            names.append(found[1])
            if found[1] == "BRA" and found[2] in starts:
                loops.append((starts[found[2]], len(names)))
    bodies = [names[slice(*loop)] for loop in loops if not any(_is_within(other, loop) for other in loops)]
    body = max(bodies, key=_tensor_instructions, default=names)
    return Code(Counter(names), Counter(body if _tensor_instructions(body) else names))


def tensor_share(counts: Counter[str]) -> float:
    """Share of tensor-core instructions."""
    return _tensor_instructions(list(counts.elements())) / counts.total()


def _is_within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _tensor_instructions(names: Sequence[str]) -> int:
    return sum(name in TENSOR_CORE for name in names)


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
