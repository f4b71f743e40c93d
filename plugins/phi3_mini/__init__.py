"""Phi-3-mini and Phi-3.5-mini: RMSNorm, fused qkv and gate/up, no biases."""

from phireg_plugins.phi3_mini import config, weights

import phireg.api as ph

MINI_4K = {
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
}


def tell_apart(hf: ph.HFConfig) -> str | None:
    """Refuse models whose heads share KV heads: those are phi3-medium's."""
    heads, kv_heads = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if kv_heads is None or kv_heads == heads:
        return None
    return f"{heads} heads share {kv_heads} KV heads, and phi3-mini's have one each"


FAMILY = ph.Family(
    name="phi3-mini",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    steps=(config, weights),
    api=1,
    tell_apart=tell_apart,
    published=(
        ph.PublishedModel("microsoft/Phi-3-mini-4k-instruct", MINI_4K),
        ph.PublishedModel(
            "microsoft/Phi-3-mini-128k-instruct", {**MINI_4K, "max_position_embeddings": 131072}
        ),
    ),
    demo="phireg_plugins.phi3_mini:demo",
)
