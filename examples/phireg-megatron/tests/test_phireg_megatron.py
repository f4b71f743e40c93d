"""The conformance tests of phireg, applied to phi4-megatron."""

from phireg_megatron import FAMILY

from phireg.testing import FamilyConformance


class TestMegatron(FamilyConformance):
    """Five groups of two query heads."""

    family = FAMILY
    tp_sizes = (1, 5)
    tiny = {  # noqa: RUF012
        "hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 10,
        "num_key_value_heads": 5, "intermediate_size": 70, "vocab_size": 97,
        "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-3,
        "rope_theta": 250000.0, "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
