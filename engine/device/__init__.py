"""The machine: choice of device and precision, the device's work queue, its memory and the host's heap."""
