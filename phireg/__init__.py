"""phireg converts Microsoft's Phi models to TensorRT-LLM checkpoints.

The command line is ``phireg``; the same jobs as functions are in :mod:`phireg.jobs`; what plugins
import is :mod:`phireg.api`.
"""
