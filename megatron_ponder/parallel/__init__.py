"""Runs micro-batches on the ranks of a layout, and reduces their gradients."""
