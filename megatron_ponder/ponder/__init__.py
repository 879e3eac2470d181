"""Training methods as plans of passes: pure torch, no communication."""
