"""A decode step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture(step: Callable[[], None], restore: Callable[[], None]) -> Any:
    """Record ``step`` in a CUDA graph (``torch.cuda.CUDAGraph``), to replay in its place.

    Everything that changes from one step to the next must lie in tensors on the device that stay
    where they are: then the host never waits, and one graph serves every step. ``restore`` undoes
    what ``step`` did to them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # kernels are compiled and workspaces made before recording
        restore()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
