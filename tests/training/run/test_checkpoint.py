"""Checkpoints are complete, safe to read, and belong to one run."""

import pytest
import torch

from engine.errors import ResumeError
from engine.training.run import checkpoint


def test_round_trip(tmp_path):
    path = checkpoint.checkpoint_path(tmp_path / "out.safetensors")
    settings = {"seed": 1, "iterations": (1, 2), "config": {"last": 2}}
    checkpoint.save(path, settings, {"x": torch.zeros(2)})
    checkpoint.save(path, settings, {"x": torch.ones(2)})
    assert torch.equal(checkpoint.load(path, settings)["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors.checkpoint"]


def test_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c"
    checkpoint.save(path, {}, {"n": 1})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {}, {"n": 2})
    assert checkpoint.load(path, {}) == {"n": 1}


def test_refusals(tmp_path):
    path = tmp_path / "c"
    path.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(ResumeError, match="damaged"):
        checkpoint.load(path, {})
    torch.save({"format": 0}, path)
    with pytest.raises(ResumeError, match="another format"):
        checkpoint.load(path, {})
    checkpoint.save(path, {"seed": 1}, {})
    with pytest.raises(ResumeError, match="seed = 1, not 2"):
        checkpoint.load(path, {"seed": 2})
