"""A full disk at every change of the files: one line, no half-written file, and the same command then ends as if undisturbed."""

import pytest
from support.full_disk import CASES, attack, build_shim, every, is_possible, some

pytestmark = pytest.mark.skipif(not is_possible(), reason="needs Linux and a C compiler")


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that fails changes of files."""
    return build_shim(tmp_path_factory.mktemp("shim"))


def check(name, numbers, model, shim, folder, *, is_lasting):
    runs = list(attack(CASES[name], model, shim, folder, numbers, is_lasting=is_lasting))
    assert sum(failed for _, failed, _ in runs) >= 2


@pytest.mark.parametrize(
    ("name", "is_lasting"),
    [("render", False), ("picture", True), ("upscale", True), ("export-png", True), ("build-over", True)],
)
def test_full_disk(shim, name, tmp_path, model_file, is_lasting):
    check(name, some(), model_file, shim, tmp_path, is_lasting=is_lasting)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_full_disk_in_training(shim, tmp_path, model_file):
    """A longer run for each change, so with growing gaps between them."""
    check("train", some(), model_file, shim, tmp_path, is_lasting=True)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "full"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "train"])
def test_full_disk_at_every_change(shim, name, tmp_path, model_file, is_lasting):
    check(name, every(), model_file, shim, tmp_path, is_lasting=is_lasting)
