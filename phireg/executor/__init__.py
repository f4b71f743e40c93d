"""Runs a TensorRT-LLM checkpoint of the Phi family in PyTorch, straight from its files.

It shares no code with what writes checkpoints: what it computes is evidence about them.
"""

from phireg.executor.blueprint import Blueprint, read_blueprint
from phireg.executor.model import Executor, load

__all__ = ["Blueprint", "Executor", "load", "read_blueprint"]
