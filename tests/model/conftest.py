"""Checkpoints of small networks."""

import pytest
import torch
from safetensors.torch import save_file

from engine.archs.esrgan import RRDBNet


@pytest.fixture
def checkpoint(tmp_path, small_rrdb):
    save_file(small_rrdb.state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def other_checkpoint(tmp_path, small_rrdb):
    """The same network except for one weight."""
    state = {name: tensor.clone() for name, tensor in small_rrdb.state_dict().items()}
    state["conv_last.bias"][0] += 0.25
    save_file(state, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.fixture
def state():
    """Tensors of the smallest RRDBNet."""
    torch.manual_seed(0)
    return RRDBNet(channels=3, blocks=1, growth=3).state_dict()
