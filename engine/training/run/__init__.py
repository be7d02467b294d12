"""What every training run shares: the loop, checkpoints, events, the optimiser, precision and seeds."""
