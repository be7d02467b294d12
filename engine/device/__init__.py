"""The machine: choice of the device, its queue of work, its memory and the host's heap."""
