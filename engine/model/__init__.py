"""Model files, and checkpoints from elsewhere."""
