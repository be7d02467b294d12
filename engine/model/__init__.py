"""Model files and other people's checkpoints."""
