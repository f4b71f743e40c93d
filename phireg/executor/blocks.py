"""The parts of a decoder layer as plain functions: norm, linear, rotary, attention, MLP, experts.

``Weights`` are one rank's tensors of one layer under the names they have in the file, without the
``transformer.layers.N.`` in front, as ``quantized.prepare`` makes them. Shapes: batch B, new tokens
T, keys S, heads H and key/value heads G of one rank, head size D, rotary dimensions R, hidden
size h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from phireg.executor import quantized
from phireg.reader.spec import ModelSpec, Rope
from phireg.reader.tensors import KEY_SCALE, KV_SCALE, ROUTER, VALUE_SCALE

Weights: TypeAlias = Mapping[str, Tensor]
Rotary: TypeAlias = "tuple[Tensor, Tensor]"
# Keys and values of one layer and rank, [B, G, C, D] each with C slots.
Cache: TypeAlias = "tuple[Tensor, Tensor]"
# (query [B, H, T, D], key and value [B, G, T, D]) -> [B, H, T, D]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# (the product of qkv [B, T, (H + 2 G) * D], the cache that the T tokens enter, the scale of its
# levels, and a rounding of the result as in ``cuda.launch``) -> [B, T, H * D]
AttendCache: TypeAlias = Callable[[Tensor, Cache, "Tensor | None", Any], Tensor]
# partial sums of the ranks in this process -> their sum over all ranks
Reduce: TypeAlias = Callable[[list[Tensor]], Tensor]

# Queries attended to at a time: bounds the mask and the scores of long prompts.
QUERY_CHUNK = 512


def norm(spec: ModelSpec, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply LayerNorm, or RMSNorm that is rounded to the model's dtype before its weight."""
    weight = weights[f"{name}.weight"]
    if spec.architecture.norm == "rms_norm":
        return functional.rms_norm(x, x.shape[-1:], eps=spec.norm_epsilon) * weight
    bias = weights[f"{name}.bias"]
    return functional.layer_norm(x, x.shape[-1:], weight, bias, spec.norm_epsilon)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Return X W^T + b of a column-parallel linear: each rank has its own outputs and biases."""
    return quantized.linear(weights, name, x, weights.get(f"{name}.bias"))


def row_linear(shards: list[Weights], name: str, xs: list[Tensor], reduce: Reduce) -> Tensor:
    """Return X W^T over inputs split across ranks; the bias is added once, after the sum."""
    partial = [quantized.linear(w, name, x, None) for w, x in zip(shards, xs, strict=True)]
    total = reduce(partial)
    bias = shards[0].get(f"{name}.bias")
    return total if bias is None else total + bias


def rotary_tables(rope: Rope, length: int, long: bool, device: torch.device) -> Rotary:
    """Return cos and sin for positions 0 to length - 1, float32 [length, R/2], mscale included."""
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim
    divisor = rope.base**exponent
    mscale = 1.0
    if rope.short is not None and rope.long is not None:
        factors = rope.long if long else rope.short
        mscale = rope.long_mscale if long else rope.short_mscale
        divisor = divisor * torch.tensor(factors, dtype=torch.float32, device=device)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] / divisor
    return angle.cos() * mscale, angle.sin() * mscale


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first R dimensions of [B, H, T, D] in float32; the rest passes through.

    ``rotary`` broadcasts to [B, 1, T, R/2]. Dimension j < R/2 is paired with j + R/2.
    """
    cos, sin = rotary
    half = cos.shape[-1]
    left, right = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def attention(
    spec: ModelSpec, weights: Weights, u: Tensor, rotary: Rotary, attend: Attend
) -> Tensor:
    """Return one rank's heads, [B, T, h] -> [B, T, H * D], before the output projection.

    With a quantized cache, attention is to the values the cache gives back, those of the prompt's
    own tokens too: logits are the same with and without a cache. TensorRT-LLM's fused kernel for
    prompts attends to their keys and values before they are quantized.
    """
    heads, kv_heads, size = spec.rank_heads, spec.rank_kv_heads, spec.head_size
    rows = linear(weights, "attention.qkv", u).view(*u.shape[:-1], -1, size).transpose(1, 2)
    query, key, value = rows.split([heads, kv_heads, kv_heads], dim=1)
    query, key = rotate(query, rotary), rotate(key, rotary)
    if (grid := spec.quantization.kv_cache) is not None:
        key = quantized.fake_quantize(key, cache_scale(weights, KEY_SCALE), grid)
        value = quantized.fake_quantize(value, cache_scale(weights, VALUE_SCALE), grid)
    output = attend(query, key, value)
    return output.transpose(1, 2).flatten(2)


def cache_scale(weights: Weights, name: str) -> Tensor:
    """Return the scale of the cache's keys or values: their own, or the one for both."""
    return weights[name if name in weights else KV_SCALE]


def activate(spec: ModelSpec, z: Tensor) -> Tensor:
    """Apply the MLP's nonlinearity to fc's output; gated ones halve the last dimension."""
    if spec.activation == "swiglu":
        up, gate = z.chunk(2, dim=-1)
        return functional.silu(gate) * up
    if spec.activation == "gegelu":
        gate, value = z[..., 0::2], z[..., 1::2]
        if spec.gegelu_limit is not None:
            gate = gate.clamp(max=spec.gegelu_limit)
            value = value.clamp(-spec.gegelu_limit, spec.gegelu_limit)
        return gate * torch.sigmoid(1.702 * gate) * (value + 1)
    return functional.gelu(z, approximate="tanh")


def mixture(
    spec: ModelSpec,
    shards: list[Weights],
    ranks: Sequence[int],
    u: Tensor,
    reduce: Reduce,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run the experts in the MLP's place; every rank scores all in float32 and runs its own.

    ``observe`` is called with an expert's number and a rank's part of its proj's input.
    """
    assert spec.experts is not None
    tokens = u.flatten(0, -2)
    scores = functional.linear(tokens.float(), shards[0][ROUTER])
    chosen, shares = route(scores, spec.mixer_epsilon)
    partial = []
    for rank, weights in zip(ranks, shards, strict=True):
        first = spec.experts.first(rank)
        own = range(first, first + spec.experts.rank_count)
        partial.append(rank_mixture(own, weights, tokens, chosen, shares, observe))
    return reduce(partial).view_as(u)


def route(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return each token's experts and their weights, as sparse mixer chooses at inference.

    The weight of the best expert is its share in a softmax over those whose score is near the best
    one: (best - score) / max(|score|, best) is at most 2 epsilon. The second is the best of the
    others, and its weight the same among those others. The two weights do not add up to 1.
    ``scores`` are float32 [tokens, experts]; the result is int64 and float32 [tokens, 2].
    """
    chosen, weights = [], []
    left = scores
    for _ in range(2):
        best, expert = left.max(dim=-1, keepdim=True)
        distance = (best - scores) / torch.maximum(scores.abs(), best)
        near = left.masked_fill(distance > 2 * epsilon, -torch.inf)
        weights.append(near.softmax(dim=-1).gather(-1, expert))
        chosen.append(expert)
        left = left.scatter(-1, expert, -torch.inf)
    return torch.cat(chosen, dim=-1), torch.cat(weights, dim=-1)


def rank_mixture(
    experts: range,
    weights: Weights,
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return the sum over one rank's experts, whose numbers are ``experts``.

    Of fc each has [2 F, h], the rows [up; gate], of proj [h, F]; ``x`` is [tokens, h]. ``chosen``
    and ``shares`` are as ``route`` returns them.
    """
    total = torch.zeros_like(x)
    for index, expert in enumerate(experts):
        token, place = torch.nonzero(chosen == expert, as_tuple=True)
        if not len(token):
            continue
        own = quantized.of_expert(weights, index)
        up, gate = linear(own, "mlp.fc", x[token]).chunk(2, dim=-1)
        gated = functional.silu(gate) * up
        if observe is not None:
            observe(expert, gated)
        output = linear(own, "mlp.proj", gated)
        total.index_add_(0, token, (output * shares[token, place, None]).to(x.dtype))
    return total


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend to every token's own and all earlier ones; shapes as ``Attend``."""
    key, value = _per_query_head(query, key, value)
    return _attention(query, key, value, is_causal=True, scale=scale)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Callable[[int, int, int], Tensor]
) -> Tensor:
    """Attend under any causal mask, a chunk of queries at a time.

    The queries [B, H, T, D] are the last T of the S positions of ``key`` and ``value`` [B, G, S,
    D]. ``mask`` takes (first, last, keys) and returns bool that broadcasts to [B, H, last - first,
    keys]: what the queries of the slots first to last - 1 see of the slots before ``keys``. Every
    query must see one key at least.
    """
    key, value = _per_query_head(query, key, value)
    total, new = key.shape[2], query.shape[2]
    chunks = []
    for start in range(0, new, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, new)
        first, last = total - new + start, total - new + stop
        seen = mask(first, last, last)
        own = query[:, :, start:stop]
        chunks.append(
            _attention(own, key[:, :, :last], value[:, :, :last], attn_mask=seen, scale=scale)
        )
    return torch.cat(chunks, dim=2)


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Return PyTorch's attention, in which what is no number stays so."""
    y = functional.scaled_dot_product_attention(query, key, value, **options)
    if key.shape[2] < 16 and key.device.type == "cpu":
        # PyTorch takes a row of fewer scores than 16 that are all NaN for one that sees no key.
        lost = query.float().sum(-1, keepdim=True) + key.float().sum((-2, -1), keepdim=True)
        y += (0 * lost).to(y.dtype)
    return y


def _per_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values: query head j uses key/value head j // (H / G)."""
    group = query.shape[1] // key.shape[1]
    if group == 1:
        return key, value
    return key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
