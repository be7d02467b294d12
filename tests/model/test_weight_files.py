"""The table of weight files, the places where they are found, and their digests."""

import dataclasses
import hashlib
import re

import pytest

from engine.errors import ModelError
from engine.model.weight_files import WEIGHTS, hub_folder, weights_folder


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Empty folders of the user."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for folder in (hub_folder(), weights_folder()):
        folder.mkdir(parents=True)


def test_table_is_consistent():
    for name, file in WEIGHTS.items():
        assert name == file.name
        for title, digest in file.names.items():
            assert len(digest) == 8
            if match := re.search(r"-([0-9a-f]{8})\.(pth|safetensors)$", title):
                assert match[1] == digest
        for member, digest in (file.members or {}).items():
            assert digest.startswith(file.names.get(member.rpartition("/")[2], ""))


def test_places_in_order(tmp_path):
    file = WEIGHTS["vgg16"]
    assert file.find() is None
    for folder in (hub_folder(), weights_folder(), tmp_path):
        (folder / "vgg16-c679942c.safetensors").touch()
        assert file.find(tmp_path) == folder / "vgg16-c679942c.safetensors"
    assert file.find() == weights_folder() / "vgg16-c679942c.safetensors"


def test_digest_belongs_to_the_name(tmp_path):
    path = tmp_path / "vgg16-c679942c.safetensors"
    path.write_bytes(b"weights")
    with pytest.raises(ModelError, match="expected c679942c: not torchvision's VGG-16 .*; delete it, then run engine"):
        WEIGHTS["vgg16"].check(path)
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    dataclasses.replace(WEIGHTS["vgg16"], names={path.name: digest}).check(path)
    WEIGHTS["vgg16"].check(tmp_path / "mine.safetensors")  # a user's own file has no digest to compare
