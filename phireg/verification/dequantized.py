"""A quantized checkpoint as the values that its weights stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from phireg.executor import ModelSpec
from phireg.executor.model import Source
from phireg.reader.schemes import LINEARS, Quantization


def dequantized(spec: ModelSpec, sources: Sequence[Source]) -> tuple[ModelSpec, list[Source]]:
    """The same model with nothing quantized, neither inputs nor the KV cache.

    Args:
        spec: a checkpoint's, quantized or not.
        sources: its ranks' tensors by name.
    """
    plain = dataclasses.replace(spec, quantization=Quantization())
    if spec.quantization.weights is None:
        return plain, list(sources)
    return plain, [_Dequantized(source) for source in sources]


class _Dequantized:
    """One rank's tensors; weights of linears in float32."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __call__(self, name: str) -> Tensor:
        tensor, (linear, _, part) = self._source(name), name.rpartition(".")
        if part != "weight" or not linear.endswith(LINEARS):
            return tensor
        values = tensor.float() * self._source(f"{linear}.weights_scaling_factor")[:, None]
        if tensor.is_floating_point():
            return values  # FP8 has no smoothing
        return values * self._source(f"{linear}.prequant_scaling_factor").float()
