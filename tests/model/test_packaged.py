"""Networks with names: found in the engine's folder or in packages, built, or refused with the command that fetches them."""

import importlib.util

import pytest
import torch

from engine.archs import build
from engine.errors import ModelError, UsageError
from engine.model.checkpoints import read_checkpoint
from engine.model.packaged import PACKAGED, find_packaged, provenance


@pytest.mark.weights
@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_networks_enlarge(name):
    archive = PACKAGED[name].archive
    if importlib.util.find_spec(archive.module) is None:
        pytest.skip(f"{archive.distribution} is not installed")
    path = find_packaged(name)
    PACKAGED[name].check(path)
    net = build(read_checkpoint(path), str(path))
    assert sum(parameter.numel() for parameter in net.parameters()) == 16_697_987
    # A trained network keeps enlarged grey grey.
    assert (net(torch.full((1, 3, 8, 8), 0.5))[..., 12:20, 12:20] - 0.5).abs().mean() < 0.05
    source, licence = provenance(name)
    assert licence.startswith("MIT")
    assert f"models/{path.name} of the PyPI package {archive.distribution} 1." in source


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="choose one of realsr, x4plus"):
        find_packaged("nothing")


def test_absent_packages_are_refused(monkeypatch, tmp_path):
    folders = [str(tmp_path)]
    empty = importlib.util.spec_from_file_location("p", tmp_path / "p.py", submodule_search_locations=folders)
    for spec in (None, empty):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ModelError, match="engine weights fetch realsr"):
            find_packaged("realsr")
