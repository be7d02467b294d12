"""Version of the engine, written into every model and store."""

__version__ = "0.1.0"
