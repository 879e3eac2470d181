"""Micro-batches and gradients over ranks."""
