"""A source's config.json as the class that runs the model reads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.source.tensors import SourceTensor

_OLDER_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
}
"""transformers' names of keys of the first Phi configs, which came with code of their own."""

_OLDER_TYPES = ("phi-msft", "mixformer-sequential")


def read_values(directory: Path) -> dict[str, Any]:
    """Read config.json without what only chooses code or a storage format."""
    values = read_json_object(directory / "config.json")
    for name in ("auto_map", "_attn_implementation", "quantization_config"):
        values.pop(name, None)
    return values


_SIZES = (
    *("hidden_size", "intermediate_size", "ff_intermediate_size", "vocab_size", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_local_experts", "n_embd", "n_inner"),
    *("n_head", "n_head_kv"),
)
_LAYERS = ("num_hidden_layers", "n_layer")


def check_sizes(values: Mapping[str, Any], tensors: Collection[SourceTensor]) -> None:
    """Refuse sizes that the files cannot have, before a model of them is built."""
    largest = max((size for tensor in tensors for size in tensor.shape), default=0)
    limits = {
        **dict.fromkeys(_SIZES, max(largest, len(tensors))),
        **dict.fromkeys(_LAYERS, len(tensors)),
    }
    for key, limit in limits.items():
        value = values.get(key)
        if isinstance(value, int | float) and not value <= limit:
            raise SourceError(f"config.json: {key} is above {limit}: the files hold no such model")


def adapt(values: dict[str, Any]) -> list[str]:
    """Make keys those of current transformers; return a note on each change of meaning."""
    if values.get("model_type") in _OLDER_TYPES:
        _rename_older(values)
    for key in ("rope_scaling", "rope_parameters"):
        block = values.get(key)
        if isinstance(block, dict) and "su" in (block.get("type"), block.get("rope_type")):
            # The first name of long rope, which transformers 5 no longer knows.
            values[key] = {**block, "type": "longrope", "rope_type": "longrope"}
    if values.get("sliding_window") is None:
        return []
    values["sliding_window"] = None
    return [
        "the reference attends to all tokens: TensorRT-LLM takes a sliding window at run time, "
        "not from the checkpoint"
    ]


def _rename_older(values: dict[str, Any]) -> None:
    """Name an older Phi config's keys as transformers' Phi class does."""
    values["model_type"] = "phi"
    for older, name in _OLDER_KEYS.items():
        if values.get(older) is not None:
            values[name] = values[older]
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return
    values.setdefault("intermediate_size", 4 * hidden)
    if values.get("partial_rotary_factor") is None:
        size = hidden // heads
        # Half a dimension more, since the class rounds down.
        rotated = min(int(values.get("rotary_dim") or 32), size)
        values["partial_rotary_factor"] = min(1.0, (rotated + 0.5) / size)
