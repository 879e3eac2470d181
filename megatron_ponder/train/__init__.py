"""One training run: step, loop, evaluation, metrics."""
