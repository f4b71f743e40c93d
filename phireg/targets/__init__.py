"""Targets: the files that a model is written to, and what their readers take."""
