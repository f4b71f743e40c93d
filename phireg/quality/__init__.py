"""Measure on the executor how much a quantization changes a model."""
