"""Command line: one module per group of commands. Everything below it is unaware of the terminal."""
