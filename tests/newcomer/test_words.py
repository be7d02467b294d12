"""Defects 19 and 20: advice in the words of the command line, and small things that are expected of a command."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--memory 10", "--memory 10: has no unit; write one, such as 10GiB or 10MiB"),
        ("--size -5x10", "--size -5x10: not a size; write WIDTHxHEIGHT in pixels, such as 4096x3072"),
        ("--device mps", "--device mps: "),
    ],
)
def test_19_advice_is_in_the_words_of_the_command_line(machine, words, line):
    text = machine.refuses(f"engine render --out a.zarr {words}", 2)
    assert text.startswith(f"engine: {line}")
    assert len(text) < 200
    assert machine.names() == []


def test_20_what_is_expected_of_a_command(machine):
    version = machine("engine --version").out
    assert machine("python -m engine -V").out == version
    assert machine("engine help").out == machine("engine --help").out
    assert "--overwrite" in machine("engine help render").out
    machine("engine --install-completion --shell bash")
    machine.photo("photo.png", 64, 48)
    assert "64x48" in machine("engine info photo.png").out


def test_the_package_comes_from_the_wheel(machine):
    """Not from the working tree, whatever the running environment has installed."""
    path = machine("python -c 'import engine; print(engine.__file__)'").out
    assert path.startswith(str(machine.venv))
