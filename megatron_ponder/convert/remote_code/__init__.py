"""What an exported model carries along: loaded by transformers where this package is not installed.

The files of this folder are copied into an export as they are, so they import torch, transformers
and each other (relatively), nothing else. `convert/exported_code.py` does the copying.
"""
