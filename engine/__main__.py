"""Command line as ``python -m engine``."""

from engine.cli.app import main

main()
