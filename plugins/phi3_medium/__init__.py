"""Phi-3-medium and Phi-4: Phi-3-mini's mapping, which allows grouped KV heads."""

from phireg_plugins.phi3_mini import FAMILY as BASE

import phireg.api as ph

MEDIUM_4K = {
    **BASE.published[0].config,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "intermediate_size": 17920,
}


def tell_apart(hf: ph.HFConfig) -> str | None:
    """Refuse models whose heads do not share KV heads: those are phi3-mini's."""
    heads, kv_heads = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        return None
    return "every head has its own KV head, and phi3-medium's share them"


FAMILY = BASE.derive(
    "phi3-medium",
    tell_apart=tell_apart,
    published=(
        ph.PublishedModel("microsoft/Phi-3-medium-4k-instruct", MEDIUM_4K),
        ph.PublishedModel(
            "microsoft/Phi-3-medium-128k-instruct", {**MEDIUM_4K, "max_position_embeddings": 131072}
        ),
    ),
    demo="phireg_plugins.phi3_medium:demo",
)
