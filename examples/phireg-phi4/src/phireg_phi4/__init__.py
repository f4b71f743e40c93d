"""Phi-4 and Phi-4-mini: what they are called and how to know them.

Their tensors and configs are Phi-3's: Phi-4 has another rope base, Phi-4-mini a tied head, long
rope, and heads that are rotated in part. Phi-3's tables allow all of that, so nothing is amended.
"""

from phireg_plugins.phi3_medium import FAMILY as PHI3

from phireg.api import HFConfig, PublishedModel, in_rope

ROPE_BASE = 250000.0
"""Phi-4's; Phi-3's is 10000."""

PHI4_14B = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "intermediate_size": 17920,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": ROPE_BASE,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

PHI4_MINI_4B = {
    **PHI4_14B,
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 200064,
    "max_position_embeddings": 131072,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
}


def is_phi4(hf: HFConfig) -> str | None:
    """The rope base tells; the vocabulary may have grown in a fine-tune."""
    base = _first(hf, *in_rope("rope_theta"), "rope_theta")
    if base == ROPE_BASE:
        return None
    return f"its rope base is {base or 'not stated'}, and Phi-4's is {ROPE_BASE:g}"


def is_phi4_mini(hf: HFConfig) -> str | None:
    """No other published model of this architecture rotates its heads in part."""
    share = _first(hf, *in_rope("partial_rotary_factor"), "partial_rotary_factor")
    if share not in (None, 1, 1.0):
        return None
    return "its heads are rotated as a whole, and Phi-4-mini's in part"


def _first(hf: HFConfig, *keys: str) -> object:
    return next((hf.get(key) for key in keys if hf.has(key)), None)


PHI4 = PHI3.derive(
    "phi4",
    api=1,
    tell_apart=is_phi4,
    published=(PublishedModel("microsoft/phi-4", PHI4_14B),),
)

PHI4_MINI = PHI3.derive(
    "phi4-mini",
    api=1,
    tell_apart=is_phi4_mini,
    published=(PublishedModel("microsoft/Phi-4-mini-instruct", PHI4_MINI_4B),),
)
