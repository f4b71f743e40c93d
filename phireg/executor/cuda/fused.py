"""The layers of generation on a GPU: as ``Executor.run_layer`` computes them, by seven kernels.

``verify`` does not use them. A residual that is still to be added is passed beside the hidden
states to the next norm, which adds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phireg.executor import blocks, quantized
from phireg.executor.blocks import AttendCache, Cache, Reduce, Weights
from phireg.executor.cuda import launch, linears
from phireg.executor.cuda.launch import Rounding
from phireg.executor.cuda.linears import Experts
from phireg.executor.levels import find_packed
from phireg.executor.model import Executor
from phireg.reader.spec import ModelSpec
from phireg.reader.tensors import KV_SCALE, ROUTER


def forward(
    executor: Executor,
    ids: Tensor,
    caches: list[list[Cache]],
    attends: list[list[AttendCache]],
) -> Tensor:
    """Return logits of each row's last token, float32 [B, vocab_size]; fill the caches.

    ``ids`` are int64 [B, T]. ``caches`` and ``attends`` are lists of layers, and within these of
    ranks.
    """
    spec, ends = executor.spec, executor.end_weights()
    sequential = spec.architecture.residual == "sequential"
    x = executor.embed(ends, ids)
    tokens = ids.numel()
    pending: Tensor | None = None

    def rounding(weights: Weights, linear: str) -> Rounding | None:
        # Inputs become levels where they are computed, if the linear takes them.
        return rounding_before(weights, linear, tokens, executor.dtype, x)

    def levels_of(rounding: Rounding | None) -> torch.dtype | None:
        return None if rounding is None else executor.dtype

    for index in range(spec.num_layers):
        shards = executor.layer_weights(index)
        rounded = rounding(shards[0], "attention.qkv") if sequential else None
        u = _norm(spec, shards[0], "input_layernorm", x, pending, rounded)
        into = [rounding(weights, "attention.dense") for weights in shards]
        heads = []
        for rank, weights in enumerate(shards):
            bias = weights.get("attention.qkv.bias")
            qkv = _linear(weights, "attention.qkv", u, bias, x, levels=levels_of(rounded))
            kv_scale = weights.get(KV_SCALE)
            heads.append(attends[index][rank](qkv, caches[index][rank], kv_scale, into[rank]))
        attended = _row_linear(
            spec, shards, "attention.dense", heads, executor.reduce, x, levels=levels_of(into[0])
        )
        if spec.experts is not None:
            u = _norm(spec, shards[0], "post_layernorm", x, attended, None)
            mlp = _mixture(executor, shards, u, x)
        else:
            rounded = rounding(shards[0], "mlp.fc") if sequential else None
            if sequential:
                u = _norm(spec, shards[0], "post_layernorm", x, attended, rounded)
            into = [rounding(weights, "mlp.proj") for weights in shards]
            gated = [
                _linear(
                    *(weights, "mlp.fc", u, weights.get("mlp.fc.bias"), x),
                    activation=spec.activation, limit=spec.gegelu_limit,
                    levels=levels_of(rounded), rounding=into[rank],
                )
                for rank, weights in enumerate(shards)
            ]  # fmt: skip
            mlp = _row_linear(
                spec, shards, "mlp.proj", gated, executor.reduce, x, levels=levels_of(into[0])
            )
        pending = mlp if sequential else attended + mlp
    last = x[:, -1:].contiguous()
    delta = None if pending is None else pending[:, -1:].contiguous()
    u = _norm(spec, ends[0], "transformer.ln_f", last, delta, None)
    parts = [_linear(weights, "lm_head", u, weights.get("lm_head.bias"), last) for weights in ends]
    return executor.whole_logits(parts)[:, 0]


def rounding_of(weights: Weights, linear: str) -> Rounding | None:
    """Return how the inputs of a linear are quantized, if they are."""
    scale = weights.get(f"{linear}.activation_scaling_factor")
    if scale is None:
        return None
    smoothing = weights.get(f"{linear}.prequant_scaling_factor")
    return Rounding(scale, smoothing, "fp8" if smoothing is None else "int8")


def rounding_before(
    weights: Weights, linear: str, tokens: int, dtype: torch.dtype, hidden: Tensor
) -> Rounding | None:
    """Return how inputs of so many tokens become levels before ``_linear``, if it takes these.

    ``hidden`` are the tokens' hidden states, to which the linear's output will be added.
    """
    found, packed = rounding_of(weights, linear), find_packed(weights, linear)
    if found is None or packed is None:
        return found if tokens == 1 else None
    if packed.grid == "e4m3" and (tokens == 1 or quantized.multiplies_e4m3(packed, dtype)):
        return replace(found, dtype=torch.float8_e4m3fn)
    if packed.grid == found.grid == "int8":
        return replace(found, dtype=torch.int8, lost=hidden)
    return found if tokens <= linears.FEW_TOKENS else None


def _norm(
    spec: ModelSpec,
    weights: Weights,
    name: str,
    x: Tensor,
    pending: Tensor | None,
    rounding: Rounding | None,
) -> Tensor:
    """Return ``blocks.norm`` of x + pending, which ``x`` becomes; with ``rounding`` as levels."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    kind, epsilon = spec.architecture.norm, spec.norm_epsilon
    return launch.norm(kind, x, pending, weight, bias, epsilon, rounding)


def _row_linear(
    spec: ModelSpec,
    shards: list[Weights],
    name: str,
    xs: list[Tensor],
    reduce: Reduce,
    hidden: Tensor,
    *,
    levels: torch.dtype | None,
) -> Tensor:
    bias = shards[0].get(f"{name}.bias")
    if spec.tp_size == 1:
        return _linear(shards[0], name, xs[0], bias, hidden, levels=levels)
    pairs = zip(shards, xs, strict=True)
    total = reduce([_linear(w, name, x, None, hidden, levels=levels) for w, x in pairs])
    return total if bias is None else total + bias


def _linear(
    weights: Weights,
    name: str,
    x: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    *,
    activation: str = "none",
    limit: float | None = None,
    levels: torch.dtype | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """Return ``quantized.linear``, and the MLP's nonlinearity on it.

    ``x`` may have levels already, as ``rounding_before`` says, which also says what ``hidden`` is;
    ``levels`` is the compute dtype then. The result of the nonlinearity becomes levels by
    ``rounding``.
    """
    if quantized.is_divided(weights, name):
        outputs: list[Tensor] = []
        while quantized.is_divided(weights, name, len(outputs)):
            outputs.append(_linear(weights, f"{name}.{len(outputs)}", x, None, hidden))
        y = torch.cat(outputs, dim=-1)
        y = y if bias is None else y + bias
        return y if activation == "none" else launch.activate(activation, y, limit, rounding)
    x = quantized.rounded_inputs(weights, name, x)
    own, dtype = rounding_of(weights, name), levels or x.dtype
    x_scale = None if own is None else own.scale
    tokens = x.numel() // x.shape[-1]
    if levels is None:
        before = rounding_before(weights, name, tokens, dtype, hidden)
        x = x if before is None else launch.quantize(x, before, levels=True)
    if tokens == 1:
        return linears.matvec(
            *(weights, name, x, bias, dtype), x_scale=x_scale, activation=activation, limit=limit,
            rounding=rounding,
        )  # fmt: skip
    packed = find_packed(weights, name)
    if packed is not None and (tokens <= linears.FEW_TOKENS or x.dtype == torch.int8):
        return linears.product(
            *(weights, name, x, bias, dtype), x_scale=x_scale, activation=activation, limit=limit,
            rounding=rounding,
        )  # fmt: skip
    if own is not None and packed is not None and quantized.multiplies_e4m3(packed, dtype):
        y = quantized.stored_product(x, packed, own.scale, dtype, bias)
    else:
        x = x if own is None else launch.quantize(x, own, levels=False)
        weight = linears.expanded(weights, name, x.shape[-1], dtype)
        y = functional.linear(x, weight, bias)
    if activation != "none":
        return launch.activate(activation, y, limit, rounding)
    return y


def _mixture(executor: Executor, shards: list[Weights], u: Tensor, hidden: Tensor) -> Tensor:
    """Return ``blocks.mixture`` of a step's tokens [B, 1, h], reading the experts they use only.

    ``hidden`` is as for ``rounding_before``. Prompts take ``blocks.mixture`` itself, expert by
    expert.
    """
    spec = executor.spec
    if u.shape[1] > 1:
        return blocks.mixture(spec, shards, executor.ranks, u, executor.reduce)
    assert spec.experts is not None
    tokens = u.flatten(0, -2)
    if len(tokens) == 1:
        router = ROUTER.removesuffix(".weight")
        scores = linears.matvec(shards[0], router, tokens, None, torch.float32)
    else:
        scores = functional.linear(tokens.float(), shards[0][ROUTER])
    chosen, shares = linears.route(scores, spec.mixer_epsilon)
    partial = [
        rank_experts(weights, tokens, chosen, shares, spec.experts.first(rank), hidden)
        for rank, weights in zip(executor.ranks, shards, strict=True)
    ]
    return executor.reduce(partial).view_as(u)


def rank_experts(
    weights: Weights, x: Tensor, chosen: Tensor, shares: Tensor, first: int, hidden: Tensor
) -> Tensor:
    """Return ``blocks.rank_mixture``, pair by pair of a token and an expert.

    ``hidden`` is as for ``rounding_before``.
    """
    names = ("mlp.fc", "mlp.proj")
    fc, proj = (rounding_before(weights, name, 1, x.dtype, hidden) for name in names)
    levels = x if fc is None else launch.quantize(x, fc, levels=True)
    gated = linears.matvec(
        *(weights, "mlp.fc", levels, None, x.dtype), x_scale=None if fc is None else fc.scale,
        activation="swiglu", rounding=proj, experts=Experts(chosen, first, chosen.shape[-1]),
    )  # fmt: skip
    outputs = linears.matvec(
        *(weights, "mlp.proj", gated, None, x.dtype), x_scale=None if proj is None else proj.scale,
        experts=Experts(chosen, first, 1),
    )  # fmt: skip
    return linears.combine(outputs, shares)


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
