"""The linears of a network, one way per quantization scheme.

What is stored decides: e4m3 and int8 weights with their scales become quantize and dequantize
layers around the product, as TensorRT's compiler looks for them; raw weights of a weight-only
scheme are quantized here, as TensorRT-LLM's builder quantizes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phireg.reader.schemes import Grid, WeightScheme
from phireg.tensorrt.graph import Graph, Value
from phireg.tensorrt.parameters import Parameters

_WEIGHT_ONLY_BITS = {"int8_wo": 8, "int4_wo": 4}


def linear(
    graph: Graph, parameters: Parameters, name: str, scheme: WeightScheme | None, x: Value
) -> Value:
    """Return X W^T without bias; ``x`` is [tokens, in] in the checkpoint's dtype."""
    weight = f"{name}.weight"
    if scheme is None:
        return graph.product(x, parameters.value(weight))
    if scheme in _WEIGHT_ONLY_BITS:
        stored, scale = quantize_rows(parameters.tensor(weight), _WEIGHT_ONLY_BITS[scheme])
        if scheme == "int4_wo":
            packed, shape = pack_int4(stored), tuple(stored.shape)
            integers = graph.constant(packed, weight, graph.trt.int4, shape)
        else:
            integers = graph.constant(stored, weight)
        scales = graph.constant(scale, f"{name}.weights_scaling_factor")
        return graph.product(x, _dequantized(graph, integers, scales, x, axis=0))
    if scheme == "int8_sq":
        x = graph.binary("PROD", x, parameters.value(f"{name}.prequant_scaling_factor", (1, -1)))
        scales = parameters.value(f"{name}.weights_scaling_factor")
        whole = _dequantized(graph, parameters.value(weight), scales, x, axis=0)
    else:
        scales = parameters.value(f"{name}.weights_scaling_factor", ())
        whole = _dequantized(graph, parameters.value(weight), scales, x)
    scale = parameters.value(f"{name}.activation_scaling_factor", ())
    return graph.product(through_grid(graph, x, scale, "fp8" if scheme == "fp8" else "int8"), whole)


def through_grid(graph: Graph, x: Value, scale: Value, grid: Grid) -> Value:
    """Round to the values of a grid, in steps of a float32 scalar, and back."""
    kind = graph.trt.fp8 if grid == "fp8" else graph.trt.int8
    return _dequantized(graph, graph.add("quantize", x, scale, kind), scale, x)


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the integers that TensorRT-LLM's builder stores, int8 [out, in], and scales [out].

    A row's scale is its largest magnitude / 2^(bits - 1), and divides in float32; halves round away
    from zero. The scale that multiplies again has the weight's dtype.
    """
    end = 2 ** (bits - 1)
    values = weight.float()
    scale = values.abs().amax(dim=1, keepdim=True) / end
    scaled = values / torch.where(scale > 0, scale, 1)
    whole = scaled.trunc()
    rounded = whole + scaled.sign() * ((scaled - whole).abs() >= 0.5)
    return rounded.clamp(-end, end - 1).to(torch.int8), scale[:, 0].to(weight.dtype)


def pack_int4(stored: Tensor) -> Tensor:
    """Return two values to a byte, row after row, the first in the low half; an even number."""
    halves = stored.flatten().view(torch.uint8).view(-1, 2) & 15
    return halves[:, 0] | halves[:, 1] << 4


def _dequantized(
    graph: Graph, stored: Value, scale: Value, like: Value, axis: int | None = None
) -> Value:
    settings = {} if axis is None else {"axis": axis}
    return graph.add("dequantize", stored, scale, like.dtype, **settings)
