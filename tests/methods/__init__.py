"""A method that is in no paper: the worked example of docs/adding-a-method.md."""
