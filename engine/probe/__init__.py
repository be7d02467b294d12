"""Measurement of networks: receptive field, seam error, half precision, memory and time."""
