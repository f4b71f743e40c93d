"""The tensors that TensorRT-LLM's reader requires in a rank file: names, shapes and dtypes.

Written down apart from the families' rules, so that a mapping is compared with the reader and not
with itself. Shapes follow TensorRT-LLM's layers: ColumnLinear cuts output features, RowLinear
cuts input features and keeps its bias whole on every rank, attention holds at least one KV head per
rank, the vocabulary of lm_head is rounded up to a multiple of the ranks. Experts are one tensor for
all of a rank, [experts, rows, columns], with a float32 router that is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phireg.dtypes import WEIGHT_DTYPES
from phireg.reader.architectures import ARCHITECTURES
from phireg.reader.config import Config
from phireg.reader.schemes import KV_SCALE as _KV_SCALE
from phireg.reader.schemes import ROW_LINEARS, SCHEMES, Scheme
from phireg.reader.spec import Dimensions, parse_dimensions

Kind = tuple[str, tuple[int, ...]]
"""Safetensors code and shape of a tensor."""

ROUTER = "mlp.router.weight"
EMBEDDING = "transformer.vocab_embedding.weight"
KV_SCALE = f"attention.{_KV_SCALE}"
KEY_SCALE, VALUE_SCALE = "attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor"
"""Exporters write them beside KV_SCALE, which is the larger of the two."""

_SCALE: Kind = ("F32", (1,))
_GROUPED = [name for name, scheme in SCHEMES.items() if scheme.grouped]


def required_tensors(config: Mapping[str, Any], tp_size: int) -> dict[str, Kind] | None:
    """Return every tensor the reader wants in each rank file, which is the same for all ranks.

    None is for an unknown architecture; ``quant_algo`` must be out of ``schemes.KNOWN``. Of a dtype
    that no weights have, the code is empty.
    """
    if config.get("architecture") not in ARCHITECTURES:
        return None
    return rank_tensors(parse_dimensions(Config(config), tp_size))


def rank_tensors(dims: Dimensions) -> dict[str, Kind]:
    """Return every tensor one rank file must have, by its full name; all ranks have the same."""
    tensors = end_tensors(dims)
    for layer in range(dims.num_layers):
        for name, kind in layer_tensors(dims, layer).items():
            tensors[layer_prefix(layer) + name] = kind
    return tensors


def end_tensors(dims: Dimensions) -> dict[str, Kind]:
    """Return one rank's tensors that belong to no layer, by their full names."""
    code, hidden = _code(dims), dims.hidden_size
    table = [dims.vocab_size, hidden]
    if (split := dims.embedding_split) is not None:
        table[split] = -(-table[split] // dims.tp_size)
    tensors: dict[str, Kind] = {EMBEDDING: (code, tuple(table))}
    tensors |= _norm(dims, "transformer.ln_f")
    tensors["lm_head.weight"] = (code, (dims.rank_vocab_size, hidden))
    if dims.architecture.lm_head_bias:
        tensors["lm_head.bias"] = (code, (dims.rank_vocab_size,))
    return tensors


def layer_tensors(dims: Dimensions, layer: int) -> dict[str, Kind]:
    """Return one rank's tensors of a layer, by their names after ``layer_prefix``."""
    row, code = dims.architecture, _code(dims)
    hidden, size, inner = dims.hidden_size, dims.head_size, dims.rank_intermediate_size
    fc = inner if dims.activation == "gelu_tanh" else 2 * inner
    linears = {
        "attention.qkv": ((dims.rank_heads + 2 * dims.rank_kv_heads) * size, hidden),
        "attention.dense": (hidden, dims.rank_heads * size),
    }
    tensors: dict[str, Kind] = {}
    mlp = {"mlp.fc": (fc, hidden), "mlp.proj": (hidden, inner)}
    if (experts := dims.experts) is None:
        linears |= mlp
    else:
        tensors[ROUTER] = ("F32", (experts.count, hidden))
        for name, shape in mlp.items():
            scheme = dims.quantization.scheme(layer_prefix(layer) + name)
            tensors |= _experts(name, code, (experts.rank_count, *shape), scheme)
    for name, shape in linears.items():
        scheme = dims.quantization.scheme(layer_prefix(layer) + name)
        tensors |= _linear(name, code, shape, scheme)
        if row.attention_bias if name.startswith("attention") else row.mlp_bias:
            tensors[f"{name}.bias"] = (code, shape[:1])
    if dims.quantization.kv_cache is not None:
        tensors[KV_SCALE] = _SCALE
    tensors |= _norm(dims, "input_layernorm")
    if row.residual == "sequential":
        tensors |= _norm(dims, "post_layernorm")
    return tensors


def optional_tensors(dims: Dimensions) -> dict[str, Kind]:
    """Return the scales of the cache that exporters write unasked, by their full names."""
    quantization = dims.quantization
    if quantization.kv_cache is None and quantization.weights is None:
        return {}
    return {
        layer_prefix(layer) + name: _SCALE
        for layer in range(dims.num_layers)
        for name in (KV_SCALE, KEY_SCALE, VALUE_SCALE)
    }


def layer_prefix(layer: int) -> str:
    """Return the file's prefix of a layer's names."""
    return f"transformer.layers.{layer}."


def is_scale(name: str) -> bool:
    """Return whether a tensor holds scaling factors of quantization."""
    return name.endswith(("scaling_factor", "scaling_factor_2"))


def replicated(dims: Dimensions, name: str) -> bool:
    """Return whether every rank must hold the same values.

    These are norms, the embedding, the router of experts, biases of row linears; of the scales,
    those of activations and of the cache, of weights that are not split or have one scale for all
    rows and no experts that ranks share out, and the smoothing of inputs that are not split.
    """
    module, _, part = name.rpartition(".")
    row = module.endswith(ROW_LINEARS)
    grouped = (dims.quantization.weights or "") in _GROUPED
    if part == "weights_scaling_factor" and grouped:
        return False
    if part == "weights_scaling_factor":
        shared_out = dims.experts is not None and dims.experts.ep_size > 1 and ".mlp." in module
        return not shared_out and (row or dims.quantization.weights == "fp8")
    if part == "prequant_scaling_factor":
        return not row
    if is_scale(part) or (row and part == "bias"):
        return True
    return "norm" in name or "ln_f" in name or name.endswith((EMBEDDING, ROUTER))


def _linear(name: str, code: str, shape: tuple[int, int], scheme: Scheme | None) -> dict[str, Kind]:
    """Return weight and scales; raw weights of a weight-only scheme are like unquantized ones."""
    if scheme is None or scheme.storage is None:
        return {f"{name}.weight": (code, shape)}
    parts = scheme.storage.parts(*shape, code)
    return {f"{name}.{part.name}": (part.code, part.shape) for part in parts.values()}


def _experts(
    name: str, code: str, shape: tuple[int, int, int], scheme: Scheme | None
) -> dict[str, Kind]:
    """Return weight and scales of a stack of experts: each has its weight's, all one of inputs."""
    tensors = _linear(name, code, shape[1:], scheme)
    tensors[f"{name}.weight"] = (tensors[f"{name}.weight"][0], shape)
    if (scale := f"{name}.weights_scaling_factor") in tensors:
        tensors[scale] = ("F32", (shape[0], 1))
    return tensors


def _norm(dims: Dimensions, name: str) -> dict[str, Kind]:
    parts = ("weight", "bias") if dims.architecture.norm == "layer_norm" else ("weight",)
    return {f"{name}.{part}": (_code(dims), (dims.hidden_size,)) for part in parts}


def _code(dims: Dimensions) -> str:
    return WEIGHT_DTYPES.get(dims.dtype, "")
