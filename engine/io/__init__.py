"""Files: photographs as input, Zarr stores and files of tensors as output."""
