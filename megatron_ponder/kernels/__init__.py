"""Tensor functions that the passes are made of, without communication and without state."""
