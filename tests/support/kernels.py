"""Checks that every kernel must pass: equality with its twin on dirty memory, and compilation for five GPUs.

A kernel's twin is its definition in PyTorch, ``<op>_torch``.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import engine
from engine.kernels import machine_code
from engine.kernels.machine_code import ARCHITECTURES, signature

_POISON = 0xCD
_ROOT = Path(engine.__file__).parent.parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

BOTH = pytest.mark.parametrize("use_triton", [False, pytest.param(True, marks=needs_triton)], ids=["twin", "kernel"])
"""Run a test with the twin and with the kernel."""


def poison(tensor):
    """Fill with NaN, or with 0xCD in every byte; returns the tensor."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.is_contiguous():
        tensor.view(-1).view(torch.uint8).fill_(_POISON)
        return tensor
    return tensor.copy_(poison(torch.empty(tensor.shape, dtype=tensor.dtype)))


def poisoned(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    """A new tensor that holds NaN, or 0xCD in every byte of an integer."""
    return poison(torch.empty(shape, dtype=dtype)).contiguous(memory_format=memory_format)


def layouts(tensor):
    """(name, the same values [..., C, h, w]) in three memory layouts: planes, channels last, window of a larger tensor."""
    yield "planes", tensor.contiguous()
    yield "channels last", tensor.movedim(-3, -1).contiguous().movedim(-1, -3)
    larger = poisoned((*tensor.shape[:-2], tensor.shape[-2] + 3, tensor.shape[-1] + 5), tensor.dtype)
    window = larger[..., 1 : 1 + tensor.shape[-2], 2 : 2 + tensor.shape[-1]]
    yield "a window", window.copy_(tensor)


def assert_close_to_twin(result, twin, atol=0.0, exact=None, factor=2.0):
    """Assert that the kernel's ``result`` has the shape, dtype, strides and values of ``twin``.

    Integers must be equal, floats equal within ``atol``. With ``exact`` (the true values, in higher precision) the kernel's
    largest error may be ``factor`` times the twin's own, plus ``atol``: the measure for half precision.
    """
    assert result.shape == twin.shape
    assert result.dtype == twin.dtype
    # The stride of a dimension of one element has no meaning.
    assert [s for s, n in zip(result.stride(), result.shape, strict=True) if n > 1] == [
        s for s, n in zip(twin.stride(), twin.shape, strict=True) if n > 1
    ]
    if exact is None:
        tolerance = 0.0 if not result.is_floating_point() else atol
        torch.testing.assert_close(result, twin, atol=tolerance, rtol=0.0, equal_nan=True)
        return
    assert torch.isfinite(result).all(), "the kernel left an element unwritten, or wrote NaN or infinity"
    own, theirs = (float((t.double() - exact.double()).abs().max()) for t in (result, twin))
    assert own <= factor * theirs + atol, f"largest error {own:.3g}, the twin's own {theirs:.3g}"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    registers: int
    """Registers of a thread."""

    stack: int
    """Bytes of a thread's stack, which holds spilled registers."""

    shared: int
    """Bytes of shared memory."""

    ptx: str = field(repr=False)
    """Assembly text."""


def compile_all(cases, architectures=ARCHITECTURES):
    """Compile without a GPU, in one process because it takes seconds to start.

    Args:
        cases: (kernel, ``machine_code.Signature``) each.
        architectures: compute capabilities times 10.

    Returns:
        {architecture: Compiled} of each case.
    """
    jobs = [(kernel.fn.__module__, kernel.fn.__name__, signature, architectures) for kernel, signature in cases]
    # A process of its own, because here kernels are interpreted; 0 asks for Triton without its interpreter.
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(_ROOT)}
        process = subprocess.run(
            [sys.executable, __file__], input=json.dumps(jobs), capture_output=True, text=True, env=environment
        )
    assert process.returncode == 0, process.stderr
    return [{int(a): Compiled(**values) for a, values in job.items()} for job in json.loads(process.stdout)]


def assert_all_compile(cases, architectures=ARCHITECTURES):
    """``compile_all``, and assert that no register is spilled."""
    results = compile_all(cases, architectures)
    for (kernel, _), result in zip(cases, results, strict=True):
        for architecture, compiled in result.items():
            name = f"{kernel.fn.__name__} for sm_{architecture}"
            assert ".entry" in compiled.ptx
            assert compiled.stack == 0, f"{name} spills: a stack of {compiled.stack} bytes"
    return results


def launches(monkeypatch, call):
    """Launches of ``call`` on a GPU, as cases for ``assert_all_compile`` with the types of their arguments."""
    cases = []

    def record(kernel, _, *arguments, **options):
        cases.append((kernel, signature(kernel, arguments, options)))

    with on_a_gpu(monkeypatch, record), torch.no_grad():
        call()
    return cases


@contextmanager
def on_a_gpu(monkeypatch, record, kernels=True):
    """Let every operation take the path of a GPU, with its kernel or without, and pass its launches to ``record``."""
    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("engine.kernels."):
                patch.setattr(module, "is_interpreting", lambda: False, raising=False)
            if name.startswith("engine.kernels.") and not name.endswith(".launch"):
                patch.setattr(
                    module, "use_kernel", lambda _, forced: kernels if forced is None else forced, raising=False
                )
                patch.setattr(module, "launch", record, raising=False)
                patch.setattr(module, "fastest", lambda name, candidates, *_: candidates[0], raising=False)
        yield


def _compile(module, name, signature, architecture):
    kernel = getattr(importlib.import_module(module), name)
    compiled = machine_code.compile_for(kernel, machine_code.Signature(*signature), architecture)
    registers, stack = machine_code.resources(compiled.asm["cubin"])
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"]}


if __name__ == "__main__":
    found = [{a: _compile(*job, a) for a in architectures} for *job, architectures in json.load(sys.stdin)]
    print(json.dumps(found))  # noqa: T201
