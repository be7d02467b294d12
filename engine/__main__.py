"""Entry of the command line, as ``engine`` and ``python -m engine``.

Importing the command line takes most of the start. A signal in that time, or while Python shuts down, ends the process with
one line.
"""

from __future__ import annotations

import os

from engine.interrupt import EXIT_CODE, exit_at_once, handle


def main() -> None:
    """Run the command line of the process and exit with its code."""
    handle(exit_at_once)
    from engine.cli.app import main as run

    try:
        run()
    except SystemExit as end:
        if end.code == EXIT_CODE:
            os._exit(EXIT_CODE)  # without waiting for threads whose work was interrupted
        raise


if __name__ == "__main__":
    main()
