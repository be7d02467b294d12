"""Which tests need which device."""

import pytest
import torch


def needs_gpu(test):
    """Marked ``gpu``, and skipped without one."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))
