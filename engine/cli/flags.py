"""Flags that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from engine.errors import UsageError, option

JsonFlag = Annotated[bool, Parameter(help="Print JSON instead of text.")]
QuietFlag = Annotated[bool, Parameter(name=["--quiet", "-q"], help="Print warnings and the result alone.")]
VerboseFlag = Annotated[
    bool, Parameter(name=["--verbose", "-v"], help="Print the plan and the measurements in detail.")
]
VggPath = Annotated[
    Path | None, Parameter(help="Weights of VGG-19 or VGG-16, a file of torchvision; default: the file that is found.")
]
Licence = Annotated[str, Parameter(help="Licence of the photograph, recorded in the output file.")]
Source = Annotated[str, Parameter(help="Author and origin of the photograph, recorded in the output file.")]


def set_output(quiet: bool, verbose: bool = False) -> None:
    """Silence progress and notes, or not."""
    from engine.cli.progress import console

    if quiet and verbose:
        raise UsageError(f"{option('quiet', True)} and {option('verbose', True)}: exclude each other; give one of them")
    console.quiet = quiet
