"""A training run: step, loop, evaluation, metrics."""
