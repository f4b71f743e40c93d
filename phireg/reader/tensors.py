"""The tensors a spec expects in a rank file: names, shapes and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from phireg.executor.experts import ROUTER
from phireg.reader.quantization import ROW_LINEARS, WeightScheme
from phireg.reader.spec import ModelSpec

KV_SCALE = "attention.kv_cache_scaling_factor"
# Exporters write them beside KV_SCALE; it is the larger of the two.
KEY_SCALE, VALUE_SCALE = "attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor"


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor.

    Attributes:
        shape: its shape; a tensor without dimensions passes for (1,).
        dtype: what it is read as.
        stored: the same bits under an older dtype are accepted too.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype | None = None


def layer_prefix(layer: int) -> str:
    """What the file puts in front of a layer's names."""
    return f"transformer.layers.{layer}."


def layer_tensors(spec: ModelSpec) -> dict[str, Expected]:
    """One rank's tensors of one layer, by their names after ``transformer.layers.N.``."""
    hidden, size = spec.hidden_size, spec.head_size
    inner = spec.rank_intermediate_size
    fc = inner if spec.activation == "gelu_tanh" else 2 * inner
    qkv = (spec.rank_heads + 2 * spec.rank_kv_heads) * size
    dtype = _dtype(spec)
    tensors: dict[str, Expected] = {}
    linears = {
        "attention.qkv": (qkv, hidden),
        "attention.dense": (hidden, spec.rank_heads * size),
    }
    if (experts := spec.experts) is None:
        linears |= {"mlp.fc": (fc, hidden), "mlp.proj": (hidden, inner)}
    else:
        tensors[ROUTER] = Expected((experts.count, hidden), torch.float32)
        tensors["mlp.fc.weight"] = Expected((experts.rank_count, fc, hidden), dtype)
        tensors["mlp.proj.weight"] = Expected((experts.rank_count, hidden, inner), dtype)
    for name, shape in linears.items():
        tensors |= _linear(spec, name, shape)
        attention = name.startswith("attention")
        if spec.attention_bias if attention else spec.mlp_bias:
            tensors[f"{name}.bias"] = Expected(shape[:1], dtype)
    if spec.quantization.kv_cache is not None:
        tensors[KV_SCALE] = Expected((1,), torch.float32)
    tensors |= _norm(spec, "input_layernorm")
    if spec.residual == "sequential":
        tensors |= _norm(spec, "post_layernorm")
    return tensors


def optional_layer_tensors(spec: ModelSpec) -> dict[str, Expected]:
    """What a layer may have besides: scales of the cache that exporters write unasked."""
    quantization = spec.quantization
    if quantization.kv_cache is None and quantization.weights is None:
        return {}
    return {name: Expected((1,), torch.float32) for name in (KV_SCALE, KEY_SCALE, VALUE_SCALE)}


def end_tensors(spec: ModelSpec) -> dict[str, Expected]:
    """One rank's tensors that belong to no layer, by their full names."""
    rows, dtype = spec.padded_vocab_size // spec.tp_size, _dtype(spec)
    tensors = {
        "transformer.vocab_embedding.weight": Expected((spec.vocab_size, spec.hidden_size), dtype),
        **_norm(spec, "transformer.ln_f"),
        "lm_head.weight": Expected((rows, spec.hidden_size), dtype),
    }
    if spec.lm_head_bias:
        tensors["lm_head.bias"] = Expected((rows,), dtype)
    return tensors


def rank_tensors(spec: ModelSpec) -> dict[str, Expected]:
    """Every tensor one rank file must have, by its full name; all ranks have the same."""
    return end_tensors(spec) | _in_all_layers(spec, layer_tensors(spec))


def optional_rank_tensors(spec: ModelSpec) -> dict[str, Expected]:
    """Every tensor one rank file may have besides, by its full name."""
    return _in_all_layers(spec, optional_layer_tensors(spec))


def is_scale(name: str) -> bool:
    """Whether a tensor holds scaling factors of quantization."""
    return name.endswith("scaling_factor")


def replicated(name: str, weights: WeightScheme | None = None) -> bool:
    """Whether every rank must hold the same values.

    These are norms, the embedding, the router of experts, biases of row linears; of the scales,
    those of activations and of the cache, of weights that are not split or have one scale for all
    rows, and the smoothing of inputs that are not split.

    Args:
        name: the tensor's name, with or without the layer's prefix.
        weights: the checkpoint's weight scheme; scales depend on it.
    """
    module, _, part = name.rpartition(".")
    row = module.endswith(ROW_LINEARS)
    if part == "weights_scaling_factor":
        return row or weights == "fp8"
    if part == "prequant_scaling_factor":
        return not row
    if is_scale(part) or (row and part == "bias"):
        return True
    return "norm" in name or "ln_f" in name or name.endswith(("vocab_embedding.weight", ROUTER))


def _linear(spec: ModelSpec, name: str, shape: tuple[int, int]) -> dict[str, Expected]:
    """Weight and scales; raw weights of a weight-only scheme are like unquantized ones."""
    weights, dtype = spec.quantization.weights, _dtype(spec)
    single = Expected((1,), torch.float32)
    if weights == "fp8":
        return {
            f"{name}.weight": Expected(shape, torch.float8_e4m3fn, stored=torch.int8),
            f"{name}.weights_scaling_factor": single,
            f"{name}.activation_scaling_factor": single,
        }
    if weights == "int8_sq":
        return {
            f"{name}.weight": Expected(shape, torch.int8),
            f"{name}.weights_scaling_factor": Expected(shape[:1], torch.float32),
            f"{name}.activation_scaling_factor": single,
            f"{name}.prequant_scaling_factor": Expected(shape[1:], dtype),
        }
    return {f"{name}.weight": Expected(shape, dtype)}


def _norm(spec: ModelSpec, name: str) -> dict[str, Expected]:
    kinds = ("weight", "bias") if spec.norm == "layer_norm" else ("weight",)
    expected = Expected((spec.hidden_size,), _dtype(spec))
    return {f"{name}.{kind}": expected for kind in kinds}


def _in_all_layers(spec: ModelSpec, tensors: dict[str, Expected]) -> dict[str, Expected]:
    return {
        layer_prefix(layer) + name: expected
        for layer in range(spec.num_layers)
        for name, expected in tensors.items()
    }


def _dtype(spec: ModelSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype
