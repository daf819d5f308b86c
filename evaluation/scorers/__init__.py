"""Answer rules: pure functions from an answer's text to what it claims, without tables, files or models."""
