"""Rendering: stages, tiles, rows of pixels, and the executors that write them."""
