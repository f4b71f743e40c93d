"""The tensors of a rank file in a network: as constants, or as inputs of the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from phireg.dtypes import torch_dtype
from phireg.errors import EngineError
from phireg.reader.tensors import Kind
from phireg.tensorrt.graph import Graph, Value


@dataclass(frozen=True, eq=False)
class Parameters:
    """Makes each tensor, or an input for it, a part of the network when it is asked for."""

    graph: Graph
    kinds: Mapping[str, Kind]
    source: Callable[[str], Tensor] | None
    _values: dict[str, Value] = field(default_factory=dict, init=False)

    def __contains__(self, name: str) -> bool:
        return name in self.kinds

    def tensor(self, name: str) -> Tensor:
        """Return the tensor itself, for what is computed while the network is made."""
        if self.source is None:
            raise EngineError(f"{name} is not known when an engine without weights is built")
        return self.source(name)

    def value(self, name: str, shape: Sequence[int] | None = None) -> Value:
        """Return the network's tensor; it is always asked for in the same ``shape``, if any."""
        if name not in self._values:
            self._values[name] = self._create(name, shape)
        return self._values[name]

    def _create(self, name: str, shape: Sequence[int] | None) -> Value:
        if self.source is not None:
            tensor = self.source(name)
            return self.graph.constant(tensor if shape is None else tensor.reshape(shape), name)
        code, stored = self.kinds[name]
        # The same elements in the shape they are used in: of six layers' scales that were reshaped,
        # TensorRT for RTX 1.7.1 compiled "uses before defs".
        if shape is not None:
            stored = tuple(math.prod(stored) if size == -1 else size for size in shape)
        return self.graph.input(name, torch_dtype(code), stored)
