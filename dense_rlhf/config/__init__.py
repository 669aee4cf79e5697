"""Parameters, typed and bounded, read from YAML."""
