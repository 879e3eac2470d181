"""Optimizer and LR scheduler."""
