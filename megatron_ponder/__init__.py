"""Pretraining of language models with latent thoughts on megatron-core.

Importing the package imports no torch, so that `--help` and configuration errors are instant.
The entry point is `megatron_ponder.pretrain`; docs/architecture.md is the map.
"""

__version__ = "0.1.0"
