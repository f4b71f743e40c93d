"""The conformance tests of phireg, applied to Phi-3.5-mini and Phi-3.5-MoE."""

from collections.abc import Sequence

from phireg_phi35 import PHI35_MINI, PHI35_MOE

from phireg.testing import FamilyConformance

HIDDEN, HEADS, KV_HEADS, INNER, EXPERTS = 48, 8, 4, 20, 6
SIZE = HIDDEN // HEADS
SHORT = [1.0, 1.1, 1.3]
LONG = [1.2, 2.5, 7.0]
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "rope_theta": 5000.0,
    "sliding_window": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


MINI = {
    **COMMON,
    "num_key_value_heads": HEADS,
    "attention_bias": False,
    "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
}
MOE = {
    **COMMON,
    "num_key_value_heads": KV_HEADS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.3,
    "input_jitter_noise": 0.01,
    "attention_bias": True,
    "lm_head_bias": True,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 32,
    },
}


class TestPhi35Mini(FamilyConformance):
    """Phi-3-mini with long rope."""

    family = PHI35_MINI
    tiny = MINI


class TestPhi35MoE(FamilyConformance):
    """Experts, of which a large epsilon lets several share in a token's weight."""

    family = PHI35_MOE
    tp_sizes = (1, 2, 4)
    tiny = MOE

    def expected_rows(self, module: str) -> Sequence[tuple[str, int]] | None:
        """Experts one after the other, up before gate."""
        layer, _, name = module.partition(".mlp.")
        source = f"{layer.replace('transformer', 'model')}.block_sparse_moe.experts"
        if name == "fc":
            parts = [f"{source}.{e}.{w}" for e in range(EXPERTS) for w in ("w3", "w1")]
            return [(part, row) for part in parts for row in range(INNER)]
        if name == "proj":
            return [(f"{source}.{e}.w2", row) for e in range(EXPERTS) for row in range(HIDDEN)]
        return None
