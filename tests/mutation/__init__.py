"""Mutation campaign; see __main__.py."""
