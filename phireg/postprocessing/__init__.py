"""Mending checkpoints whose exporter left the rows of a linear in the source's order."""
