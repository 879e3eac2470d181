"""Saving and loading runs in megatron-core's sharded format."""
