"""The models and methods once more, in plain PyTorch: an oracle for tests."""
