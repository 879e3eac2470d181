"""The exported model in transformers."""
