"""The model on megatron-core's layers; the only package that builds its modules."""
