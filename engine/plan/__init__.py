"""Planning, without tensors: what a render does, and what it costs in memory, disk and time."""
