"""Files of tensors."""

import torch
from safetensors import safe_open

from engine.io.tensors import write_tensors


def test_equal_contents_are_equal_bytes(tmp_path):
    """The library orders metadata at random, so two builds of one model differed."""
    tensors = {"b": torch.arange(3.0), "a": torch.zeros(2, dtype=torch.float16)}
    metadata = {name: f'{name} "é\n\x1b' for name in ("title", "licence", "colour", "digest", "é")}
    for number in range(4):
        write_tensors(tmp_path / f"{number}", tensors, metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
        assert file.get_tensor("b").equal(tensors["b"])


def test_no_metadata(tmp_path):
    write_tensors(tmp_path / "a", {"a": torch.zeros(1)}, {})
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.get_tensor("a").equal(torch.zeros(1))
