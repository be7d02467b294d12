"""The documents and the program cannot drift apart: commands, options, examples, links and the map of the house."""

import re
import shlex
from pathlib import Path

import pytest

from engine.cli.app import app
from engine.errors import EngineError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "architecture.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[ke]*/README.md")]


def commands(group=app, before=()):
    """Every command as words: ("render",), ("model", "build"), ..."""
    for name in group:
        if not name.startswith("-"):
            inner = list(commands(group[name], (*before, name)))
            yield from inner or [(*before, name)]


COMMANDS = sorted(commands())


def command_lines(text):
    """The lines of a page's blocks of code that call the engine, as words."""
    for line in text.splitlines():
        if line.startswith("    engine "):
            yield shlex.split(line, comments=True)[1:]


def test_all_commands_are_known_here():
    assert {
        ("render",),
        ("plan",),
        ("probe",),
        ("info",),
        ("export",),
        ("model", "build"),
        ("train", "structure"),
        ("train", "sr"),
        ("score",),
    } <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_in_the_readme(command):
    assert list(command) in [words[: len(command)] for words in command_lines(README)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_every_option_has_help(command):
    found = app
    for name in command:
        found = found[name]
    assert found.help.strip().endswith(".")
    options = [argument for argument in found.assemble_argument_collection(parse_docstring=True) if argument.show]
    assert options
    silent = [argument.name for argument in options if argument.name.startswith("--") and not argument.parameter.help]
    assert silent == []


@pytest.mark.parametrize("words", list(command_lines(README)), ids=" ".join)
def test_every_command_line_of_the_readme_is_understood(words):
    app.parse_args(words, exit_on_error=False, print_error=False)


def test_every_option_in_the_documents_exists():
    known = {name for command in COMMANDS for name in _option_names(command)} | {"--help", "--version"}
    others = {
        "--constraint",
        "--editable",
        "--quiet",
        "--strict",
        "--upgrade",
        "--no-isolation",
        "--wheel",
    }  # of pip and mypy
    for page in PAGES:
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
        assert told - others <= known, page


def _option_names(command):
    found = app
    for name in command:
        found = found[name]
    return [name for argument in found.assemble_argument_collection() for name in argument.names]


def test_the_example_in_python_runs(tmp_path, monkeypatch, capsys, model_file):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    small = code.replace("size=(3072, 4096)", "size=(48, 64)")
    assert small != code
    (tmp_path / "model.safetensors").symlink_to(model_file)
    monkeypatch.chdir(tmp_path)
    exec(compile(small, "README.md", "exec"), {})
    assert "Box(" in capsys.readouterr().out
    assert (tmp_path / "out.zarr" / "zarr.json").is_file()


def test_the_example_of_the_package_is_that_of_the_readme():
    import engine

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for line in code.splitlines():
        assert line in engine.__doc__ or line.startswith("job = ")


def test_exit_codes_are_those_of_the_errors():
    def kinds(kind):
        yield kind
        for below in kind.__subclasses__():
            yield from kinds(below)

    codes = {kind.exit_code for kind in kinds(EngineError)}
    listed = re.search(r"Exit codes: 0 ok, (.*?)\(go on", README, re.DOTALL)[1]
    assert {int(n) for n in re.findall(r"\b\d+\b", listed)} == codes == {1, 2, 3, 4, 130}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_has_a_gap(page):
    """A placeholder is a number that was not measured yet."""
    assert re.findall(r"@[A-Z_]+\d*@|TODO|XXX|TBD", page.read_text()) == []


def test_the_map_names_every_file_of_the_engine():
    for path in (ROOT / "engine").iterdir():
        if path.name != "__pycache__" and path.suffix != ".typed":
            assert path.name in MAP, path.name


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"(?:benchmarks|docs|models|kernels|exporters)/[\w./-]+\.\w+", README):
        assert (ROOT / name).exists(), name
