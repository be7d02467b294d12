"""Documents against the program: generated pages, commands, options, examples, links, the layout, numbers and widths."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from engine.cli.app import app
from engine.cli.reference import commands_of, reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[kem]*/README.md")]
GUIDES = [ROOT / "README.md", ROOT / "docs" / "training.md", ROOT / "models" / "README.md"]
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
    "--no-isolation",
    "--wheel",
    "--index-url",
}
"""Options of pip, mypy and build that pages mention."""

COMMANDS = dict(commands_of(app))


def arguments(command):
    return command.assemble_argument_collection(default_parameter=app.default_parameter, parse_docstring=True)


def command_lines(page):
    """Lines of a page's code blocks that call the engine, as words; ``[optional]`` parts are taken in."""
    for line in page.read_text().splitlines():
        if match := re.match(r"    +(?:\$ )?engine (.*)", line):
            yield shlex.split(re.sub(r"[\[\]]", "", match[1]), comments=True)


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


def test_results_page_is_current():
    """``make docs`` writes it again."""
    assert load_script(ROOT / "benchmarks" / "results_page.py").page() == RESULTS


def test_results_name_scripts_that_exist():
    commands = re.findall(r"python benchmarks/(\w+\.py)", RESULTS)
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


def test_python_examples_run(tmp_path, monkeypatch, model_file):
    (tmp_path / "model.safetensors").symlink_to(model_file)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for code in examples:
        small = code.replace("size=(3072, 4096)", "size=(48, 64)")
        assert small != code
        exec(compile(small, "README.md", "exec"), {})
    assert (tmp_path / "out.zarr" / "zarr.json").is_file()


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
    for page in (README, ARCHITECTURE, (ROOT / "CONTRIBUTING.md").read_text()):
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
