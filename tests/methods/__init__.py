"""A new method: the example of docs/adding-a-method.md."""
