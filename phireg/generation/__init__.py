"""Text generation by backends: the executor, TensorRT-LLM's runtime, the source model."""

from phireg.generation.backend import (
    BACKENDS,
    Backend,
    Description,
    Options,
    Request,
    describe,
    open_backend,
    process_rank,
    run_worker,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "Description",
    "Options",
    "Request",
    "describe",
    "open_backend",
    "process_rank",
    "run_worker",
]
