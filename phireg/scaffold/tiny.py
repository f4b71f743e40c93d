"""A source config.json in miniature, for the conformance test of a new family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phireg.family import Family

_LAYERS, _HEADS, _KV_HEADS, _HEAD_SIZE, _INNER, _VOCAB, _POSITIONS = 2, 8, 2, 16, 96, 97, 128


def tiny_config(family: Family) -> dict[str, Any]:
    """The config of the family's first published model with small, awkward sizes.

    Heads share KV heads if those of the published model do, and the vocabulary is odd. A family
    without published models gets the keys that transformers' configs have in common.
    """
    published: Mapping[str, Any] = family.published[0].config if family.published else {}
    heads, kv_heads = published.get("num_attention_heads"), published.get("num_key_value_heads")
    sizes = {
        "hidden_size": _HEADS * _HEAD_SIZE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS if kv_heads == heads else _KV_HEADS,
        "vocab_size": _VOCAB,
        "max_position_embeddings": _POSITIONS,
    }
    inner = [key for key in published if key.endswith("intermediate_size")]
    sizes |= dict.fromkeys(inner or ["intermediate_size"], _INNER)
    named: dict[str, Any] = {
        "architectures": list(family.architectures[:1]),
        "model_type": family.model_types[0],
    }
    return {**named, **published, **sizes}
