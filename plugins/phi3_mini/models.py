"""The published models of Phi-3's architecture, and the one that a config resembles most.

One table and one set of rules map all of them. So the choice among their families decides a name
in messages and in phireg.json, and no byte of config.json or of a rank file.
"""

from collections.abc import Callable, Mapping
from typing import Any

import phireg.api as ph

_MINI_4K = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 32000,
}
_MINI_128K = {**_MINI_4K, "max_position_embeddings": 131072}
_MEDIUM_4K = {
    **_MINI_4K,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "intermediate_size": 17920,
}
_PHI4 = {
    **_MEDIUM_4K,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "rope_theta": 250000.0,
    "bos_token_id": 100257,
    "eos_token_id": 100257,
}
_PHI4_REASONING = {**_PHI4, "max_position_embeddings": 32768, "rope_theta": 500000.0}
_PHI4_MINI = {
    **_MINI_128K,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200064,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "bos_token_id": 199999,
    "eos_token_id": 199999,
}
# In the order in which they are preferred when a config resembles several equally.
_PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "phi3-mini": {
        "microsoft/Phi-3-mini-4k-instruct": _MINI_4K,
        "microsoft/Phi-3-mini-128k-instruct": _MINI_128K,
    },
    "phi3.5-mini": {"microsoft/Phi-3.5-mini-instruct": _MINI_128K},
    "phi3-medium": {
        "microsoft/Phi-3-medium-4k-instruct": _MEDIUM_4K,
        "microsoft/Phi-3-medium-128k-instruct": {**_MEDIUM_4K, "max_position_embeddings": 131072},
    },
    "phi4": {
        "microsoft/phi-4": _PHI4,
        "microsoft/Phi-4-reasoning": _PHI4_REASONING,
        "microsoft/Phi-4-reasoning-plus": _PHI4_REASONING,
    },
    "phi4-mini": {
        "microsoft/Phi-4-mini-instruct": _PHI4_MINI,
        "microsoft/Phi-4-mini-reasoning": _PHI4_MINI,
    },
}
# The first of the long rope factors. Without them Phi-3.5-mini is Phi-3-mini-128k to the letter.
_LONG_FACTORS = {
    "phi3.5-mini": [1.0800000429153442, 1.1100000143051147, 1.1399999856948853],
    "phi4-mini": [1, 1.118320672, 1.250641126],
}


def published(family: str) -> tuple[ph.PublishedModel, ...]:
    """Return the hub models of a family."""
    return tuple(ph.PublishedModel(name, config) for name, config in _PUBLISHED[family].items())


def teller(family: str) -> Callable[[ph.HFConfig], str | None]:
    """Return the ``tell_apart`` of a family."""

    def tell_apart(hf: ph.HFConfig) -> str | None:
        other, model = _nearest(hf)
        return None if other == family else f"it resembles {model} more, which is {other}'s"

    return tell_apart


def _nearest(hf: ph.HFConfig) -> tuple[str, str]:
    """Return the family and the model that share most features with a config.

    Heads share KV heads or they do not; that is in the shapes of weights, and decides first. Then
    every feature counts as one, so that a fine-tune may change some of them.
    """
    own = _features(hf)
    best, found = -1, ("", "")
    for family, models in _PUBLISHED.items():
        for model, config in models.items():
            theirs = _features(ph.HFConfig(config))
            theirs["long factors"] = _LONG_FACTORS.get(family)
            alike = sum(theirs[name] == value for name, value in own.items())
            if theirs["sharing"] == own["sharing"] and alike > best:
                best, found = alike, (family, model)
    return found


def _features(hf: ph.HFConfig) -> dict[str, object]:
    def stated(key: str, default: object = None) -> object:
        values = (hf.get(spelling) for spelling in (*ph.in_rope(key), key))
        return next((value for value in values if value is not None), default)

    heads, factors = hf.get("num_attention_heads"), stated("long_factor")
    kv_heads = stated("num_key_value_heads", heads)
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    others = ("max_position_embeddings", "bos_token_id", "eos_token_id")
    return {
        "sharing": kv_heads != heads,
        "heads": (heads, kv_heads),
        "rotated share": stated("partial_rotary_factor", 1.0),
        "rope base": stated("rope_theta", 10000.0),
        "long factors": factors[:3] if isinstance(factors, list) else None,
        "tied head": hf.get("tie_word_embeddings") is True,
        **{key: hf.get(key) for key in (*sizes, *others)},
    }
