"""Phi-3-medium and Phi-4: Phi-3-mini's mapping with grouped KV heads, which it already allows."""

from phireg_plugins.phi3_mini import FAMILY as BASE

from phireg.api import HFConfig, PublishedModel

MEDIUM_4K = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "intermediate_size": 17920,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def tell_apart(hf: HFConfig) -> str | None:
    """Phi-3-medium's heads share KV heads; that is all that tells it from mini."""
    heads, kv_heads = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        return None
    return "every head has its own KV head, and phi3-medium's share them"


FAMILY = BASE.derive(
    "phi3-medium",
    tell_apart=tell_apart,
    published=(
        PublishedModel("microsoft/Phi-3-medium-4k-instruct", MEDIUM_4K),
        PublishedModel(
            "microsoft/Phi-3-medium-128k-instruct", {**MEDIUM_4K, "max_position_embeddings": 131072}
        ),
    ),
    demo="phireg_plugins.phi3_medium:demo",
)
