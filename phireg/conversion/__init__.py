"""Runs a planned conversion: the output directory, the ranks' files, the manifest."""
