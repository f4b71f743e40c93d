"""Quantization as data: which scheme exists, what it covers, and how scales follow their weight."""
