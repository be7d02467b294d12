"""``python -m engine``: the command line."""

from engine.cli.app import main

main()
