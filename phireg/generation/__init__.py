"""What continues token ids: the executor, TensorRT-LLM's own runtime, the source model."""

from phireg.generation.backend import (
    BACKENDS,
    Backend,
    Description,
    Options,
    describe,
    follow,
    open_backend,
    process_rank,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "Description",
    "Options",
    "describe",
    "follow",
    "open_backend",
    "process_rank",
]
