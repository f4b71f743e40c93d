"""The second half of a layer in a network: the MLP's nonlinearity, and experts in its place."""

from __future__ import annotations

import math

import torch

from phireg.reader.spec import ModelSpec
from phireg.reader.tensors import ROUTER
from phireg.tensorrt.graph import Graph, Value
from phireg.tensorrt.parameters import Parameters

_GEGELU_SLOPE = 1.702


def activate(graph: Graph, spec: ModelSpec, z: Value) -> Value:
    """Apply the nonlinearity to fc's output, [tokens, columns]; gated ones halve the columns."""
    size = spec.rank_intermediate_size
    if spec.activation == "swiglu":
        up, gate = graph.slice(z, 1, 0, size), graph.slice(z, 1, size, size)
        return graph.binary("PROD", _silu(graph, gate), up)
    if spec.activation == "gegelu":
        gate, value = graph.slice(z, 1, 0, size, 2), graph.slice(z, 1, 1, size, 2)
        if (limit := spec.gegelu_limit) is not None:
            gate = graph.binary("MIN", gate, graph.scalar(limit, gate))
            value = graph.activation("CLIP", value, alpha=-limit, beta=limit)
        scaled = graph.binary("PROD", gate, graph.scalar(_GEGELU_SLOPE, gate))
        gate = graph.binary("PROD", gate, graph.activation("SIGMOID", scaled))
        return graph.binary("PROD", gate, graph.binary("SUM", value, graph.scalar(1.0, value)))
    return graph.activation("GELU_TANH", z)


def mixture(
    graph: Graph, spec: ModelSpec, parameters: Parameters, prefix: str, rank: int, u: Value
) -> Value:
    """Return one rank's part of the experts' output; every expert computes every token."""
    assert spec.experts is not None
    dtype, size = getattr(torch, spec.dtype), spec.rank_intermediate_size
    scores = graph.product(graph.cast(u, torch.float32), parameters.value(prefix + ROUTER))
    shares = _shares(graph, spec, scores)
    if spec.experts.ep_size > 1:
        shares = graph.slice(shares, 1, spec.experts.first(rank), spec.experts.rank_count)
    tokens = graph.reshape(u, (1, -1, spec.hidden_size))
    rows = graph.product(tokens, parameters.value(f"{prefix}mlp.fc.weight"))
    up, gate = graph.slice(rows, 2, 0, size), graph.slice(rows, 2, size, size)
    inner = graph.binary("PROD", _silu(graph, gate), up)
    outputs = graph.product(inner, parameters.value(f"{prefix}mlp.proj.weight"))
    by_expert = graph.reshape(shares, (0, 0, 1), after=(1, 0, 2))
    weighted = graph.binary("PROD", graph.cast(outputs, torch.float32), by_expert)
    total = graph.reduce("SUM", weighted, 0)
    return graph.cast(graph.reshape(total, (-1, spec.hidden_size)), dtype)


def _shares(graph: Graph, spec: ModelSpec, scores: Value) -> Value:
    """Return each expert's weight for each token, as sparse mixer does: float32 [tokens, experts].

    The best expert's weight is its share in a softmax over those whose score is near the best one:
    (best - score) / max(|score|, best) is at most 2 epsilon. The second is the best of the others,
    and its weight the same among those others. All other weights are 0.
    """
    assert spec.experts is not None
    columns = torch.arange(spec.experts.count, dtype=torch.int32).view(1, -1)
    lowest = graph.constant(torch.full((1, 1), -math.inf))
    size, left, total = graph.unary("ABS", scores), scores, None
    for _ in range(2):
        layer = graph.layer("topk", left, graph.trt.TopKOperation.MAX, 1, 1 << 1)
        best, expert = layer.get_output(0), layer.get_output(1)
        distance = graph.binary(
            "DIV", graph.binary("SUB", best, scores), graph.binary("MAX", size, best)
        )
        limit = graph.scalar(2 * spec.mixer_epsilon, distance)
        far = graph.binary("GREATER", distance, limit)
        near = graph.add("softmax", graph.add("select", far, lowest, left), axes=1 << 1)
        chosen = graph.binary("EQUAL", graph.constant(columns), expert)
        share = graph.add("select", chosen, near, graph.scalar(0.0, near))
        total = share if total is None else graph.binary("SUM", total, share)
        left = graph.add("select", chosen, lowest, left)
    return total


def _silu(graph: Graph, gate: Value) -> Value:
    return graph.binary("PROD", gate, graph.activation("SIGMOID", gate))
