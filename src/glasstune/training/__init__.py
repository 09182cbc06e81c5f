"""The loop: step, loss terms, optimiser, schedule, checkpoints and metrics."""
