"""Numerical kernels of a tile's life, one operation a file; README.md has the mathematics."""
