"""Words for TensorRT's network API: layers that are checked, constants that stay alive.

Every call is followed by a look at the log, because the API neither raises nor returns an error
(``package.Log``). Tensors are the package's ITensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phireg.tensorrt.package import Package

Value: TypeAlias = Any
"""A tensor of the network, the package's ITensor."""


class Graph:
    """A network that is being described.

    ``constants`` are the tensors that were handed over, by the name of the network's tensor: the
    package refers to their memory until the engine is built, and shows bfloat16, FP8 and INT4 to
    nobody. An INT4 tensor is packed, two values to a byte, the first in the low half.
    """

    def __init__(self, package: Package) -> None:
        trt = self.trt = package.trt
        self.package = package
        self.builder = trt.Builder(package.logger)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(flags)
        package.log.check("to start a network", failed=self.network is None)
        self.constants: dict[str, Tensor] = {}
        self.dtypes: dict[torch.dtype, Any] = {
            torch.float32: trt.float32,
            torch.float16: trt.float16,
            torch.bfloat16: trt.bfloat16,
            torch.float8_e4m3fn: trt.fp8,
            torch.int8: trt.int8,
            torch.int32: trt.int32,
            torch.int64: trt.int64,
            torch.bool: trt.bool,
        }
        self._torch = {kind: dtype for dtype, kind in self.dtypes.items()}

    def layer(self, kind: str, *arguments: Any, name: str | None = None, **settings: Any) -> Any:
        """Add a layer by the name of its ``add_`` method, and make its settings."""
        label = f"the layer {kind}" + (f" of {name}" if name else "")
        layer = getattr(self.network, f"add_{kind}")(*arguments)
        self.package.log.check(label, failed=layer is None)
        if name:
            layer.name = name
        for setting, value in settings.items():
            setattr(layer, setting, value)
            self.package.log.check(f"{setting} = {value} of {label}")
        return layer

    def add(self, kind: str, *arguments: Any, **settings: Any) -> Value:
        """Add a layer as ``layer`` does, and return its output."""
        return self.layer(kind, *arguments, **settings).get_output(0)

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> Value:
        """Add an input; dimensions that are names are chosen when the engine runs."""
        sizes = [-1 if isinstance(size, str) else size for size in shape]
        tensor = self.network.add_input(name, self.dtypes[dtype], sizes)
        self.package.log.check(f"the input {name}", failed=tensor is None)
        for number, size in enumerate(shape):
            if isinstance(size, str):
                tensor.set_dimension_name(number, size)
        return tensor

    def name(self, name: str, value: Value) -> None:
        """Name a tensor, for messages and for those who read the network."""
        value.name = name
        self.package.log.check(f"the name {name}")

    def output(self, name: str, value: Value) -> None:
        """Make a tensor an output."""
        value.name = name
        self.network.mark_output(value)
        self.package.log.check(f"the output {name}")

    def constant(
        self,
        tensor: Tensor,
        name: str | None = None,
        dtype: Any = None,
        shape: Sequence[int] | None = None,
    ) -> Value:
        """Add a constant without copying it; ``dtype`` and ``shape`` are for packed INT4."""
        tensor = tensor.detach().contiguous()
        shape = tuple(tensor.shape if shape is None else shape)
        count = math.prod(shape)
        weights = self.trt.Weights(dtype or self.dtypes[tensor.dtype], tensor.data_ptr(), count)
        value = self.add("constant", shape, weights, name=name)
        if name:
            value.name = name
            self.network.set_weights_name(weights, name)
        self.constants[value.name] = tensor
        return value

    def scalar(self, number: float, like: Value) -> Value:
        """Return a constant of a tensor's dtype and rank."""
        rank = len(like.shape)
        return self.constant(torch.full((1,) * rank, number, dtype=self._torch[like.dtype]))

    def integers(self, *numbers: int) -> Value:
        """Return an int64 vector, as shapes are made of."""
        return self.constant(torch.tensor(numbers, dtype=torch.int64))

    def binary(self, operation: str, left: Value, right: Value) -> Value:
        """Combine two tensors element by element: SUM, SUB, PROD, DIV, MIN, LESS, AND, ..."""
        return self.add(
            "elementwise", left, right, getattr(self.trt.ElementWiseOperation, operation)
        )

    def unary(self, operation: str, value: Value) -> Value:
        """Apply ABS, NOT, SQRT, ..."""
        return self.add("unary", value, getattr(self.trt.UnaryOperation, operation))

    def activation(self, kind: str, value: Value, **settings: float) -> Value:
        """Apply SIGMOID, GELU_TANH, CLIP (alpha, beta), ..."""
        return self.add("activation", value, getattr(self.trt.ActivationType, kind), **settings)

    def reduce(self, operation: str, value: Value, axis: int) -> Value:
        """Reduce one dimension to size 1 by SUM, AVG or MAX."""
        return self.add(
            "reduce", value, getattr(self.trt.ReduceOperation, operation), 1 << axis, True
        )

    def product(self, left: Value, right: Value) -> Value:
        """Multiply matrices, the right one [out, in]."""
        none, transpose = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        return self.add("matrix_multiply", left, none, right, transpose)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Convert a tensor, unless it has the dtype."""
        kind = self.dtypes[dtype]
        return value if value.dtype == kind else self.add("cast", value, kind)

    def shape_of(self, *parts: int | Value) -> Value:
        """Make a shape of numbers and int64 [1] tensors."""
        tensors = [self.integers(part) if isinstance(part, int) else part for part in parts]
        return self.add("concatenation", tensors)

    def reshape(
        self,
        value: Value,
        shape: Sequence[int] | Value,
        *,
        before: Sequence[int] | None = None,
        after: Sequence[int] | None = None,
    ) -> Value:
        """Reshape, between two permutations of the dimensions; a 0 keeps the size in its place."""
        layer = self.layer("shuffle", value)
        if before:
            layer.first_transpose = tuple(before)
        if isinstance(shape, self.trt.ITensor):
            layer.set_input(1, shape)
        else:
            layer.reshape_dims = tuple(shape)
        if after:
            layer.second_transpose = tuple(after)
        self.package.log.check("the shape of a layer shuffle")
        return layer.get_output(0)

    def slice(self, value: Value, axis: int, start: int, size: int, step: int = 1) -> Value:
        """Take every ``step``-th of a dimension, ``size`` of them from ``start`` on."""
        return self.add("slice", value, (start,), (size,), (step,), axes=(axis,))
