"""Phi-4 and Phi-4-mini: their names, and how ``--family auto`` recognizes them.

Their tensors and configs are Phi-3's. Phi-4 has another rope base; Phi-4-mini a tied head, long
rope and partly rotated heads. Phi-3's tables allow all of that, so nothing is amended.
"""

from phireg_plugins.phi3_medium import FAMILY as PHI3

import phireg.api as ph

ROPE_BASE = 250000.0
"""Phi-4's; Phi-3's is 10000."""

PHI4_14B = {
    **PHI3.published[0].config,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "rope_theta": ROPE_BASE,
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


def is_phi4(hf: ph.HFConfig) -> str | None:
    """Refuse other rope bases; the vocabulary says nothing, since fine-tunes may enlarge it."""
    base = _first(hf, *ph.in_rope("rope_theta"), "rope_theta")
    if base == ROPE_BASE:
        return None
    return f"its rope base is {base or 'not stated'}, and Phi-4's is {ROPE_BASE:g}"


def is_phi4_mini(hf: ph.HFConfig) -> str | None:
    """Refuse wholly rotated heads; only Phi-4-mini has partial ones among published models."""
    share = _first(hf, *ph.in_rope("partial_rotary_factor"), "partial_rotary_factor")
    if share not in (None, 1, 1.0):
        return None
    return "its heads are rotated as a whole, and Phi-4-mini's in part"


def _first(hf: ph.HFConfig, *keys: str) -> object:
    return next((hf.get(key) for key in keys if hf.has(key)), None)


PHI4 = PHI3.derive(
    "phi4",
    api=1,
    tell_apart=is_phi4,
    published=(ph.PublishedModel("microsoft/phi-4", PHI4_14B),),
)

PHI4_MINI = PHI3.derive(
    "phi4-mini",
    api=1,
    tell_apart=is_phi4_mini,
    published=(ph.PublishedModel("microsoft/Phi-4-mini-instruct", PHI4_MINI_4B),),
)
