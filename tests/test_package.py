"""The wheel: one top-level name, everything that is in the tree, nothing else."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


DEFAULT_MODEL = "engine/models/picosdeeuropa.safetensors"


def packages_on_disk():
    """Dotted names of the folders with Python files below engine, through the links to kernels and exporters."""
    found, folders = set(), [ROOT / "engine"]
    while folders:
        folder = folders.pop()
        if any(folder.glob("*.py")):
            found.add(".".join(folder.relative_to(ROOT).parts))
        folders += [p for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"]
    return found


def modules_on_disk():
    return {
        f"{name.replace('.', '/')}/{p.name}"
        for name in packages_on_disk()
        for p in (ROOT / name.replace(".", "/")).glob("*.py")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the tree, and without the network."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("engine", "kernels", "exporters", "models"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    built = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_every_package_on_disk_is_listed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_on_disk()
    assert len(listed) == len(set(listed))


def test_every_package_has_an_init():
    assert [name for name in packages_on_disk() if not (ROOT / name.replace(".", "/") / "__init__.py").is_file()] == []


def test_kernels_exporters_and_models_are_links_inside_the_tree():
    for name in ("kernels", "exporters", "models"):
        assert (ROOT / "engine" / name).is_symlink()
        assert (ROOT / "engine" / name).readlink() == Path("..") / name


def test_the_wheel_has_one_top_level_name(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"engine"}
    (info,) = top - {"engine"}
    assert wheel.read(f"{info}/top_level.txt").decode().split() == ["engine"]


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    inside = {name for name in wheel.namelist() if name.startswith("engine/")}
    presets = {f"engine/training/presets/{p.name}" for p in (ROOT / "engine/training/presets").glob("*.toml")}
    assert presets
    assert inside == modules_on_disk() | presets | {"engine/py.typed", DEFAULT_MODEL}
    for name in ("kernels/noise.py", "exporters/tiff.py", "probe/erf.py", "commands/render.py", "archs/esrgan.py"):
        assert f"engine/{name}" in inside


def test_the_default_model_travels_and_is_small(wheel):
    assert wheel.getinfo(DEFAULT_MODEL).file_size <= 16e6
    assert wheel.read(DEFAULT_MODEL) == (ROOT / DEFAULT_MODEL).read_bytes()


def test_the_wheel_says_what_it_is(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist()} - {"engine"}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "ourgan-engine"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert wheel.read(f"{info}/entry_points.txt").decode().split() == [
        "[console_scripts]",
        "engine",
        "=",
        "engine.cli.app:main",
    ]


def test_versions_agree():
    import engine

    assert PROJECT["project"]["version"] == engine.__version__


def test_what_is_imported_is_required():
    """A module that only a developer's environment has would fail on the first import elsewhere."""
    import ast
    import re

    required = {re.match(r"[\w-]+", text)[0].lower().replace("-", "_") for text in PROJECT["project"]["dependencies"]}
    optional = {"imagecodecs", "matplotlib", "triton"}  # asked for by name, with a message, where they are needed
    imported = set()
    for name in modules_on_disk():
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"engine"} - optional <= required
