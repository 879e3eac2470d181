"""Devices, ranks and backends, and the patches that megatron-core needs on CPU."""
