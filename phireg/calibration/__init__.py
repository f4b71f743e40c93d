"""Calibration: maxima of what the source model's linears and KV cache see on sample text."""
