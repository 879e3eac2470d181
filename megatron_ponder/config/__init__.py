"""Settings: schema, presets, parsing, checks. Imports no torch."""
