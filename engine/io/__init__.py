"""Files: photographs in, Zarr stores and tensors out."""
