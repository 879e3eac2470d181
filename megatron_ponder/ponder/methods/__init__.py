"""One module per training method; the module's name is the method's name."""
