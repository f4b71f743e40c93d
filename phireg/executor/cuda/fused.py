"""The layers of generation on a GPU: as ``Executor.run_layer`` computes them, in a dozen kernels.

``verify`` does not use them. A residual that is still to be added is passed beside the hidden
states to the next norm, which adds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phireg.executor import quantized
from phireg.executor.blocks import AttendCache, Cache, Reduce, Rotary, Weights
from phireg.executor.cuda import launch
from phireg.executor.levels import find_packed
from phireg.executor.model import Executor
from phireg.reader.schemes import Grid
from phireg.reader.spec import ModelSpec
from phireg.reader.tensors import KV_SCALE


def forward(
    executor: Executor,
    ids: Tensor,
    rotary: Rotary,
    caches: list[list[Cache]],
    slot: Tensor,
    attends: list[list[AttendCache]],
) -> Tensor:
    """Return logits of each row's last token, float32 [B, vocab_size]; fill the caches.

    ``ids`` are int64 [B, T]; the first of the T tokens goes to ``slot``, int64 [1]. ``caches`` and
    ``attends`` are lists of layers, and within these of ranks. There are no experts.
    """
    spec, ends = executor.spec, executor.end_weights()
    sequential = spec.architecture.residual == "sequential"
    x = executor.embed(ends, ids)
    pending: Tensor | None = None
    for index in range(spec.num_layers):
        shards = executor.layer_weights(index)
        u = _norm(spec, shards[0], "input_layernorm", x, pending)
        heads = []
        for weights, cache, attend in zip(shards, caches[index], attends[index], strict=True):
            qkv = _linear(weights, "attention.qkv", u, weights.get("attention.qkv.bias"))
            query = launch.rotate_into(spec, qkv, rotary, cache, slot, weights.get(KV_SCALE))
            heads.append(attend(query, cache))
        attended = _row_linear(spec, shards, "attention.dense", heads, executor.reduce)
        if sequential:
            u = _norm(spec, shards[0], "post_layernorm", x, attended)
        kind, limit = spec.activation, spec.gegelu_limit
        gated = [
            _linear(weights, "mlp.fc", u, weights.get("mlp.fc.bias"), kind, limit)
            for weights in shards
        ]
        mlp = _row_linear(spec, shards, "mlp.proj", gated, executor.reduce)
        pending = mlp if sequential else attended + mlp
    last = x[:, -1:].contiguous()
    delta = None if pending is None else pending[:, -1:].contiguous()
    u = _norm(spec, ends[0], "transformer.ln_f", last, delta)
    parts = [_linear(weights, "lm_head", u, weights.get("lm_head.bias")) for weights in ends]
    return executor.whole_logits(parts)[:, 0]


def _norm(
    spec: ModelSpec, weights: Weights, name: str, x: Tensor, pending: Tensor | None
) -> Tensor:
    """Return ``blocks.norm`` of x + pending, which ``x`` becomes."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    return launch.norm(spec.architecture.norm, x, pending, weight, bias, spec.norm_epsilon)


def _row_linear(
    spec: ModelSpec, shards: list[Weights], name: str, xs: list[Tensor], reduce: Reduce
) -> Tensor:
    bias = shards[0].get(f"{name}.bias")
    if spec.tp_size == 1:
        return _linear(shards[0], name, xs[0], bias)
    total = reduce([_linear(w, name, x, None) for w, x in zip(shards, xs, strict=True)])
    return total if bias is None else total + bias


def _linear(
    weights: Weights,
    name: str,
    x: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    limit: float | None = None,
) -> Tensor:
    """Return ``quantized.linear``, and the MLP's nonlinearity on it."""
    scale, packed = weights.get(f"{name}.activation_scaling_factor"), find_packed(weights, name)
    dtype, native = x.dtype, False
    if scale is not None:
        smoothing = weights.get(f"{name}.prequant_scaling_factor")
        native = packed is not None and quantized.multiplies_e4m3(packed, dtype)
        grid: Grid = "fp8" if smoothing is None else "int8"
        x = launch.quantize(x, scale, smoothing, grid, stored=native)
    one = x.numel() == x.shape[-1]
    if native:
        assert packed is not None and packed.scale is not None and scale is not None
        if one:
            scales = (scale, packed.scale)
            return launch.matvec(x, packed.data, bias, dtype, scales, activation, limit)
        y = quantized.stored_product(x, packed, scale, dtype)
        y = y if bias is None else y + bias
    else:
        weight = quantized.weight_values(weights, name, x.shape[-1], dtype)
        if one:
            return launch.matvec(x, weight, bias, dtype, None, activation, limit)
        y = functional.linear(x, weight, bias)
    return y if activation == "none" else launch.activate(activation, y, limit)


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
