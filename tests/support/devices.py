"""Markers for tests that need a device."""

import pytest
import torch


def needs_gpu(test):
    """Mark a test ``gpu``, and skip it without a CUDA device."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))
