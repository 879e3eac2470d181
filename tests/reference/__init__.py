"""Models, methods and kernels once more, in plain PyTorch: oracles for tests."""
