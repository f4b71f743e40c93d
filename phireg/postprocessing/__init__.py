"""Reorder the rows of checkpoints whose exporter left a linear in the source's order."""
