"""Proving a conversion right: structure, config, bytes, logits, ranks; and saying where it is not.

``phireg.verify`` is the entrance. This package imports torch and transformers only in the modules
that compute.
"""
