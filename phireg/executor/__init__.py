"""Runs a TensorRT-LLM checkpoint of the Phi family in PyTorch, straight from its files.

It shares no code with what writes checkpoints, so that its results can verify them.
"""

from phireg.executor.decoder import Sampling
from phireg.executor.generate import generate, stream
from phireg.executor.model import Executor, load, read_meaning
from phireg.reader.spec import ModelSpec, read_spec

__all__ = [
    "ModelSpec",
    "Executor",
    "Sampling",
    "generate",
    "load",
    "read_meaning",
    "read_spec",
    "stream",
]
