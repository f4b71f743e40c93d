"""The conformance tests of phireg, applied to Phi-4 and Phi-4-mini."""

from typing import Any

import pytest
from phireg_phi4 import PHI4, PHI4_MINI, is_phi4, is_phi4_mini

from phireg.api import HFConfig
from phireg.testing import FamilyConformance

PHI4_TINY = {
    "hidden_size": 120,
    "num_hidden_layers": 3,
    "num_attention_heads": 20,
    "num_key_value_heads": 10,
    "intermediate_size": 70,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "rope_theta": 250000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHORT = [1.0, 1.1, 1.3]
LONG = [1.2, 2.5, 7.0]
PHI4_MINI_TINY = {
    **PHI4_TINY,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}


class TestPhi4(FamilyConformance):
    """Grouped heads that divide by five, another rope base."""

    family = PHI4
    tiny = PHI4_TINY
    tp_sizes = (1, 2, 5)


class TestPhi4Mini(FamilyConformance):
    """A tied head, heads of 8 dimensions of which 6 are rotated, long rope: 3 factors."""

    family = PHI4_MINI
    tiny = PHI4_MINI_TINY


@pytest.mark.parametrize(
    ("changes", "phi4", "mini"),
    [
        ({"rope_theta": 250000.0}, True, False),
        ({"rope_parameters": {"rope_theta": 250000, "partial_rotary_factor": 1.0}}, True, False),
        ({"rope_theta": 10000.0}, False, False),
        ({}, False, False),
        ({"partial_rotary_factor": 0.75}, False, True),
        ({"rope_parameters": {"partial_rotary_factor": 0.75}}, False, True),
    ],
)
def test_they_know_their_models(changes: dict[str, Any], phi4: bool, mini: bool) -> None:
    """However transformers wrote the rope settings."""
    hf = HFConfig({"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **changes})
    assert (is_phi4(hf) is None, is_phi4_mini(hf) is None) == (phi4, mini)
