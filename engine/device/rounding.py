"""Causes of rounding on this processor: its instructions and the number of threads.

Sums are cut into one part per thread, and into as many lanes as a register has. A float32 sum in another order differs in its
last bits, and a pixel near the middle between two levels becomes the other one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch

from engine.kernels.launch import use_kernel

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables of the environment that keep oneDNN from instructions."""

_FEATURES = {"bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
"""Half-precision instructions, and the functions of ``torch.cpu`` that look for them."""


def backend_facts(device: torch.device) -> dict[str, Any]:
    """Entries for a store's provenance: ``instructions``, such as "AVX512 bf16 amx", and ``threads``.

    Of a device also ``kernels``: those of Triton sum in another order than PyTorch, and need a compiler beside the device.
    """
    names = [torch.backends.cpu.get_cpu_capability()]
    for name, function in _FEATURES.items():
        with suppress(AttributeError, RuntimeError):  # another version of torch
            if getattr(torch.cpu, function)():
                names.append(name)
    names += [f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name)]
    facts: dict[str, Any] = {"instructions": " ".join(names), "threads": torch.get_num_threads()}
    if device.type != "cpu":
        facts["kernels"] = "triton" if use_kernel(device, None) else "torch"
    return facts


def backend_differences(stored: dict[str, Any], device: torch.device) -> list[str]:
    """Facts of a stored provenance that differ here: "threads 2 there, 1 here". Stores of earlier versions have none."""
    here = backend_facts(device)
    return [
        f"{key} {stored[key]} there, {value} here" for key, value in here.items() if stored.get(key, value) != value
    ]
