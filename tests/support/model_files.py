"""Model files to read, alter and damage."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from engine.errors import ModelError
from engine.model.checkpoints import read_checkpoint
from engine.plan.measured import SeamPoint, StageProfile

PROFILE = StageProfile("a test", {"0.98": 5}, {"0.98": 3}, (SeamPoint(0, 3.0, 4.0, 5.0), SeamPoint(4, 0.1, 0.2, 0.3)))


def contents(path):
    """(tensors by name, metadata) of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


def rewritten(path, to, change):
    """A copy whose tensors and manifest ``change(tensors, manifest)`` has altered."""
    tensors, metadata = contents(path)
    manifest = json.loads(metadata["ourgan"])
    change(tensors, manifest)
    save_file(tensors, to, {**metadata, "ourgan": json.dumps(manifest)})
    return to


def refusal(path):
    """Message, of one line, with which a checkpoint is refused."""
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path.with_suffix("")))
    assert "\n" not in message
    return message
