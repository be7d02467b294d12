"""Package: one top-level name, complete and minimal wheel, declared dependencies."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest
from support.wheel import ROOT, build_wheel

import engine

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEFAULT_MODEL = "engine/models/picosdeeuropa.safetensors"


def packages_on_disk():
    """Dotted names of the folders with Python files below engine, through the links to kernels and exporters."""
    names, folders = set(), [ROOT / "engine"]
    while folders:
        folder = folders.pop()
        if any(folder.glob("*.py")):
            names.add(".".join(folder.relative_to(ROOT).parts))
        folders += [p for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"]
    return names


def modules_on_disk():
    return {
        f"{name.replace('.', '/')}/{p.name}"
        for name in packages_on_disk()
        for p in (ROOT / name.replace(".", "/")).glob("*.py")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("tree"))) as archive:
        yield archive


def test_every_package_is_listed_and_has_an_init():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_on_disk()
    assert len(listed) == len(set(listed))
    assert [name for name in listed if not (ROOT / name.replace(".", "/") / "__init__.py").is_file()] == []


def test_kernels_exporters_and_models_are_links():
    for name in ("kernels", "exporters", "models"):
        assert (ROOT / "engine" / name).is_symlink()
        assert (ROOT / "engine" / name).readlink().parts == ("..", name)


LOCKS = {"requirements.lock": (), "requirements-dev.lock": ("weights", "dev")}
UNLOCKED = {"torch"}
"""docs/decisions/0026-pins.md says why."""


def names_of(requirements):
    return {re.match(r"[A-Za-z0-9.-]+", line)[0].lower() for line in requirements}


def pins(path):
    """Lines "name==version" of a requirements file, and the number of hashes behind each."""
    blocks = re.findall(
        r"^([a-z0-9.-]+==[^\s;]+)(.*?)(?=^[a-z]|\Z)", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE
    )
    return {pin: len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", rest)) for pin, rest in blocks}


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_hold_hashes_of_the_pinned_versions(lock):
    """Every package that the project names, at the version of constraints.txt; the rest is up to ``make lock``."""
    locked, project = pins(lock), PROJECT["project"]
    assert min(locked.values()) > 0
    assert set(locked) <= set(pins("constraints.txt"))
    extras = [line for extra in LOCKS[lock] for line in project["optional-dependencies"][extra]]
    if LOCKS[lock]:
        extras += [line for name in ("test", "plot") for line in project["optional-dependencies"][name]]
    wanted = names_of([*project["dependencies"], *extras, *PROJECT["dependency-groups"]["build"]])
    assert wanted - names_of(locked) == UNLOCKED | ({"ourgan-engine"} & wanted)
    assert "://" not in (ROOT / lock).read_text()


def test_pins_are_locked():
    assert names_of(pins("constraints.txt")) - names_of(pins("requirements-dev.lock")) == UNLOCKED


@pytest.mark.slow
def test_wheel_contents(wheel):
    """One top-level name, every module, the presets, the default model and the viewer's page, and nothing else."""
    top = {name.split("/")[0] for name in wheel.namelist()}
    (info,) = top - {"engine"}
    assert info.endswith(".dist-info")
    assert wheel.read(f"{info}/top_level.txt").decode().split() == ["engine"]
    inside = {name for name in wheel.namelist() if name.startswith("engine/")}
    page = {f"engine/view/static/{p.name}" for p in (ROOT / "engine/view/static").glob("*")}  # where node built it
    presets = {f"engine/training/presets/{p.name}" for p in (ROOT / "engine/training/presets").glob("*.toml")}
    assert presets
    assert inside == modules_on_disk() | presets | page | {"engine/py.typed", DEFAULT_MODEL}
    for name in ("kernels/noise.py", "exporters/tiff.py", "probe/erf.py", "cli/render.py", "archs/esrgan.py"):
        assert f"engine/{name}" in inside
    assert wheel.getinfo(DEFAULT_MODEL).file_size <= 16e6
    assert wheel.read(DEFAULT_MODEL) == (ROOT / DEFAULT_MODEL).read_bytes()


@pytest.mark.slow
def test_wheel_metadata(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist()} - {"engine"}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "ourgan-engine"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    scripts = wheel.read(f"{info}/entry_points.txt").decode().split()
    assert scripts == ["[console_scripts]", "engine", "=", "engine.__main__:main"]


def test_versions_agree():
    assert PROJECT["project"]["version"] == engine.__version__


def test_imports_are_declared():
    """An undeclared module that a developer's environment has would fail on import elsewhere."""
    declared = {re.match(r"[\w-]+", text)[0].lower().replace("-", "_") for text in PROJECT["project"]["dependencies"]}
    # Refused with a message where they are needed.
    optional = {
        *(
            "OpenImageIO",
            "dask",
            "distributed",
            "imagecodecs",
            "matplotlib",
            "spandrel",
            "starlette",
            "torchvision",
            "triton",
            "uvicorn",
        ),
    }
    imported = set()
    for name in modules_on_disk():
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    imported = {{"PIL": "pillow"}.get(name, name) for name in imported}
    assert imported - set(sys.stdlib_module_names) - {"engine"} - optional <= declared


def test_import_is_light():
    """``import engine`` loads no library, and any public name is found afterwards."""
    code = "import sys, engine; print(sorted({'torch', 'numpy', 'zarr', 'cyclopts'} & set(sys.modules)), engine.Store)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[] <class 'engine.store.Store'>\n"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")
@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "'3000'"), ({"GOMP_SPINCOUNT": "77"}, "'77'"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=str,
)
def test_threads_stop_spinning(own, expected):
    """OpenMP itself reports the limit that it has read when torch loads it; the user's own setting is kept."""
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= own | {"OMP_DISPLAY_ENV": "VERBOSE"}
    command = [sys.executable, "-c", "import engine; engine.load"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    reported = re.findall(r"GOMP_SPINCOUNT = (.*)", done.stderr)
    assert reported, done.stderr
    if expected is None:
        assert "'3000'" not in reported
    else:
        assert set(reported) == {expected}
