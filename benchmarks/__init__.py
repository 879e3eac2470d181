"""Measures what a run costs. Not part of the installed package; tools/benchmark.py runs it."""
