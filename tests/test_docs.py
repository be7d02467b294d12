"""Documents against the program: generated pages, commands, options, examples, links, the layout, numbers and widths."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.stores import files

import engine
from engine.cli.app import app
from engine.cli.reference import commands_of, reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[kem]*/README.md")]
GUIDES = [
    ROOT / "README.md",
    ROOT / "docs" / "training.md",
    ROOT / "docs" / "upscaling.md",
    ROOT / "docs" / "scale.md",
    ROOT / "docs" / "viewer.md",
    ROOT / "models" / "README.md",
]
"""Pages whose code blocks hold commands."""
WRAPPED = [page for page in PAGES if page.parent.name != "decisions" and page.name != "log.md"]
"""Pages that wrap at ``COLUMNS``."""

COLUMNS = 100
README_LINES = 130
OTHER_PROGRAMS = {
    "--constraint",
    "--editable",
    "--quiet",
    "--strict",
    "--upgrade",
    "--plugin",
    "--no-isolation",
    "--no-build-isolation",
    "--no-deps",
    "--require-hashes",
    "--wheel",
    "--index-url",
    "--sshloginfile",
    "--workdir",
    "--retries",
    "--env",
    "--array",
    "--cpus-per-task",
    "--mem",
    "--requeue",
    "--parsable",
    "--dependency",
    "--wrap",
    "--scheduler-file",
    "--nthreads",
    "--memory-limit",
    "--resources",
}
"""Options of pip, mypy, build, napari, GNU parallel, Slurm and Dask that pages mention."""

COMMANDS = dict(commands_of(app))


def arguments(command):
    return command.assemble_argument_collection(default_parameter=app.default_parameter, parse_docstring=True)


def command_lines(page):
    """Lines of a page's code blocks that call the engine, as words; ``[optional]`` parts are taken in."""
    for line in page.read_text().splitlines():
        if match := re.match(r"    +(?:\$ )?engine (.*)", line):
            yield shlex.split(re.sub(r"[\[\]]", "", match[1]), comments=True)


def examples(page):
    """Code of the Python examples of a page."""
    codes = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [code for code in codes if "import " in code]  # others are signatures


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Generated pages


def test_command_reference_is_current():
    """``make docs`` writes it again."""
    assert (ROOT / "docs" / "cli.md").read_text() == reference()


def test_command_reference_names_every_option():
    text = reference()
    for name, command in COMMANDS.items():
        assert f"## {name}\n" in text
        for argument in arguments(command):
            if argument.show and argument.name.startswith("--"):
                assert argument.parameter.help, (name, argument.name)
                assert f"`{argument.name}" in text, (name, argument.name)


def test_api_reference_is_current():
    """``make docs`` writes it again."""
    assert (ROOT / "docs" / "api.md").read_text() == load_script(ROOT / "docs" / "api.py").page()


def test_api_reference_names_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in set(engine.__all__) - {"__version__"}:
        assert re.search(rf"^### {name}$|^\| `{name}` \|", text, re.MULTILINE), name


def test_results_page_is_current():
    """``make docs`` writes it again."""
    assert load_script(ROOT / "benchmarks" / "results_page.py").page() == RESULTS


def test_reliability_page_is_current(monkeypatch):
    """``make docs`` writes its tables again."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    assert load_script(ROOT / "benchmarks" / "reliability_page.py").page(RELIABILITY) == RELIABILITY


def test_reliability_page_reports_no_failure():
    """A fault that ended otherwise is a defect to be fixed; the same seeds then replace its row."""
    table = RELIABILITY.partition("| fault | end |")[2].partition("\n\n")[0]
    ends = [line.split("|")[4].strip() for line in table.splitlines()[2:]]
    assert len(ends) >= 8
    assert set(ends) == {"0"}


def test_results_name_scripts_that_exist():
    commands = re.findall(r"python benchmarks/(\w+\.py)", RESULTS + RELIABILITY)
    assert commands
    for name in commands:
        assert (ROOT / "benchmarks" / name).is_file(), name


def test_exit_codes_of_the_reference():
    table = reference().partition("## Exit codes")[2].partition("## engine")[0]
    assert re.findall(r"^\| (\d+) \|", table, re.MULTILINE) == ["0", "1", "2", "3", "4", "130"]


# Examples


def test_every_command_has_help():
    for name, command in COMMANDS.items():
        assert command.help.strip().splitlines()[0].endswith("."), name


def test_command_lines_are_understood():
    for page in GUIDES:
        lines = list(command_lines(page))
        assert lines, page
        for words in lines:
            app.parse_args(words, exit_on_error=False, print_error=False)


def test_options_exist():
    known = {name for command in COMMANDS.values() for argument in arguments(command) for name in argument.names}
    for page in PAGES:
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
        assert mentioned - OTHER_PROGRAMS <= known | {"--help", "--version", "--install-completion"}, page


@pytest.fixture
def example_files(tmp_path, monkeypatch, model_file, picture):
    """Current folder with the files that the examples name: a small model, a small network for RealSR, and pictures."""
    (tmp_path / "model.safetensors").symlink_to(model_file)
    (tmp_path / "sr.safetensors").symlink_to(model_file.parent / "sr.safetensors")
    (tmp_path / "pictures").mkdir()
    for seed, name in enumerate(("photo.jpg", "pictures/a.jpg", "pictures/b.jpg")):
        pixels = (picture(24, 32, seed).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_python_examples_run(example_files, page):
    """In the page's order, with a smaller image and a smaller network."""
    smaller = {"4096x3072": "512x384", "(2000, 1000": "(200, 100", '"realsr"': '"sr.safetensors"'}
    codes = examples(page)
    assert codes
    for code in codes:
        for name, value in smaller.items():
            code = code.replace(name, value)
        exec(compile(code, page, "exec"), {})
    assert (example_files / "out.zarr" / "zarr.json").is_file()


@pytest.mark.slow
def test_python_examples_are_typed(tmp_path):
    """``mypy --strict`` passes, and finds an option that does not exist."""
    pytest.importorskip("mypy")
    codes = [code for page in ("README.md", "docs/api.md") for code in examples(page)]
    for number, code in enumerate([*codes, 'import engine\n\nengine.render(None, "a.zarr", sede=7)\n']):
        (tmp_path / f"example_{number}.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir=cache", "."]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert f"example_{len(codes)}.py:3" in errors[0]
    assert '"sede"' in errors[0]


@pytest.mark.slow
def test_shell_examples_of_parts_run(tmp_path, model_file):
    """With xargs, and as the tasks of a Slurm array, for a smaller image in two parts; both stores are equal."""
    (tmp_path / "engine").write_text(f'#!/bin/sh\nexec {sys.executable} -m engine "$@"\n')
    (tmp_path / "engine").chmod(0o755)
    changes = {"render --size 16384x12288 ": f"render {model_file} --size 256x192 --precision fp32 ", "seq 8": "seq 2"}
    changes |= {"/8": "/2", "--memory 6GiB ": "", "=2\n": "=1\n", ":-8}": ":-1}"}
    xargs, slurm = (
        next(
            code
            for code in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
            if name in code
        )
        for name in ("xargs", "SBATCH")
    )
    slurm = f"for SLURM_ARRAY_TASK_ID in 2 1; do (\n{slurm}\n) || exit; done; engine finish peaks.zarr"
    stores = []
    for name, script in (("xargs", xargs), ("slurm", slurm)):
        for old, new in changes.items():
            script = script.replace(old, new)
        (tmp_path / name).mkdir()
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=tmp_path / name, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "peaks.zarr: 256x192, complete" in done.stdout
        stores.append(files(tmp_path / name))
    assert stores[0] == stores[1]


# Text


def test_readme_is_short():
    assert len(README.splitlines()) <= README_LINES


@pytest.mark.parametrize("page", WRAPPED, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_wrapped(page):
    """Tables, code blocks, pictures and lines that are one link cannot be wrapped."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fenced ^= line.startswith("```")
        unbreakable = fenced or line.startswith(("|", "    ", "![")) or " " not in line.strip("* ")
        assert unbreakable or len(line) <= COLUMNS, f"{page.name}:{number}: {len(line)} columns"


def test_links_resolve():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), (page, target)


def test_anchors_resolve():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            text = (page.parent / target if target else page).read_text()
            titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, (page, target, anchor)


def test_no_placeholders():
    for page in PAGES:
        assert re.findall(r"@[A-Z_]+\d*@|TODO|XXX|TBD", page.read_text()) == [], page


def test_named_files_exist():
    for page in (README, ARCHITECTURE, RELIABILITY, (ROOT / "CONTRIBUTING.md").read_text()):
        for name in re.findall(
            r"(?<![\w/])(?:engine|benchmarks|docs|models|kernels|exporters|tests)/[\w./-]+\.\w+", page
        ):
            assert (ROOT / name).exists() or name == "tests/plan/test_make.py", name


def test_numbers_of_the_readme_are_measured():
    """The first column of the table of results, and the bullets, hold numbers that are in docs/results.md."""
    table = README.partition("| | engine | usual way |")[2].partition("\n\n")[0]
    bullets = re.search(r"\* \*\*Exact.*?\n\n", README, re.DOTALL)[0]
    own = " ".join(line.split("|")[2] for line in table.splitlines()[2:6])
    measured = re.findall(r"\d[\d,.]*\d|\d+x\d+", re.sub(r"`[^`]*`", "", own + " " + bullets))
    assert len(measured) > 8
    for number in measured:
        assert number.rstrip(".,") in RESULTS, number


# Layout


def test_architecture_names_every_module():
    """Each row of the second table names the modules of its folder, and no others."""
    rows = re.findall(r"^\| `(engine/[\w/]*)` \|[^|]*\| ((?:`\w+` ?)+)\|$", ARCHITECTURE, re.MULTILINE)
    listed = {folder: set(re.findall(r"\w+", modules)) for folder, modules in rows}
    links = {"kernels", "exporters", "models"}
    folders = {path.parent for path in (ROOT / "engine").rglob("*.py") if not links & set(path.relative_to(ROOT).parts)}
    assert {f"{folder.relative_to(ROOT)}/" for folder in folders} == set(listed)
    for folder in folders:
        modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
        assert listed[f"{folder.relative_to(ROOT)}/"] == modules, folder
