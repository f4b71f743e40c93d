"""A source config.json in miniature, for the conformance test of a new family."""

from __future__ import annotations

from typing import Any

from phireg.errors import PluginError
from phireg.family import Family, PublishedModel
from phireg.registry import Index

_HEADS, _KV_HEADS, _HEAD_SIZE = 8, 2, 16
_SIZES = {
    "hidden_size": _HEADS * _HEAD_SIZE,
    "num_hidden_layers": 3,
    "num_attention_heads": _HEADS,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_INNER = 200
# Values that differ from every default: a table that forgets one of these keys is noticed.
_TELLING = {"rope_theta": 5000.0, "rope_embedding_base": 5000, "rms_norm_eps": 1e-4}


def tiny_config(family: Family, installed: Index) -> dict[str, Any]:
    """The config of the family's first published model with small, awkward sizes.

    The vocabulary is odd, the intermediate size no multiple of the hidden size, and heads share KV
    heads if those of the published model do. If the family names no model, another one of the same
    architecture lends one; without that it gets the keys that transformers' configs have in common.
    """
    models = family.published or _relatives_models(family, installed)
    config = dict(models[0].config) if models else {}
    # FamilyConformance knows these itself, and its model is float32.
    for key in ("architectures", "model_type", "torch_dtype"):
        config.pop(key, None)
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    inner = [key for key in config if key.endswith("intermediate_size")] or ["intermediate_size"]
    return {
        **config,
        **_SIZES,
        "num_key_value_heads": _HEADS if kv_heads == heads else _KV_HEADS,
        **dict.fromkeys(inner, _INNER),
        **{key: value for key, value in _TELLING.items() if key in config},
    }


def _relatives_models(family: Family, installed: Index) -> tuple[PublishedModel, ...]:
    """The models of some installed family that converts the same architecture."""
    for candidate in (candidate for offers in installed.values() for candidate in offers):
        try:
            other = candidate.load()
        except PluginError:
            continue
        if other.published and set(other.architectures) & set(family.architectures):
            return other.published
    return ()
