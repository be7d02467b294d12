"""Options in messages are spelled as their reader can type them."""

import pytest

from engine.errors import EngineError, UsageError, option


@pytest.mark.parametrize(
    ("name", "value", "python", "flag"),
    [
        ("overwrite", True, "overwrite=True", "--overwrite"),
        ("tile", None, "tile", "--tile"),
        ("tile", 64, "tile=64", "--tile 64"),
        ("executor", "tiles", "executor='tiles'", "--executor tiles"),
        ("seam_tolerance", 0.5, "seam_tolerance=0.5", "--seam-tolerance 0.5"),
    ],
)
def test_option_spelling(name, value, python, flag):
    error = UsageError(f"out.zarr: exists; give {option(name, value)}, or another name")
    assert str(error) == f"out.zarr: exists; give {python}, or another name"
    assert error.for_command_line() == f"out.zarr: exists; give {flag}, or another name"


def test_message_without_options_is_unchanged():
    assert str(EngineError("a=b: --c; d@e")) == EngineError("a=b: --c; d@e").for_command_line() == "a=b: --c; d@e"
