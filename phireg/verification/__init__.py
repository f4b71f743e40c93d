"""Compare a checkpoint with its source: structure, config, bytes, logits, ranks; locate mistakes.

``phireg.verify`` is the entry point. Only the modules that compute import torch and transformers.
"""
