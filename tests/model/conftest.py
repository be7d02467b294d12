"""Checkpoints of small networks."""

import pytest
from safetensors.torch import save_file


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
