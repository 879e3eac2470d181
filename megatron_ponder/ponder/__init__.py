"""Training methods, described as plans of passes. Pure torch, no communication."""
