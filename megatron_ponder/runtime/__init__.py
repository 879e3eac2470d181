"""Devices, ranks, and what megatron-core needs without a GPU."""
