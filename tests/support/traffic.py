"""Traffic of a network on a GPU, counted on the meta device: bytes of the operands of every launch, and launches.

An operation of PyTorch moves its inputs and its output once each; views move nothing. A launch of a Triton kernel moves its
operands. Caches are not modelled.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.kernels import on_a_gpu


class _Operations(TorchDispatchMode):
    def __init__(self, traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view")):
            outputs = [] if func._schema.is_mutable else [result]
            self.traffic.add(func.name().removeprefix("aten::").partition(".")[0], [args, kwargs, *outputs])
        return result


class Traffic:
    """Launches and bytes by the name of the operation or kernel."""

    def __init__(self):
        self.launches, self.bytes = Counter(), Counter()

    def add(self, name, operands):
        self.launches[name] += 1
        tensors = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, torch.Tensor)]
        self.bytes[name] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@contextmanager
def counted(monkeypatch, *, kernels):
    """Count the traffic of a block on the meta device; ``kernels``: with the Triton kernels, or with their definitions."""
    traffic = Traffic()

    def record(kernel, _, *arguments, **options):
        traffic.add(kernel.fn.__name__, arguments)

    with on_a_gpu(monkeypatch, record, kernels), torch.no_grad(), _Operations(traffic):
        yield traffic
