"""Parts of every training run: loop, checkpoints, events, optimisation, EMA, precision, seeds."""
