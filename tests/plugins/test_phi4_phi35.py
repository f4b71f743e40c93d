"""Phi-4, Phi-4-mini, Phi-3.5-mini and -MoE: conformance, and telling Phi-3's models apart."""

import json
from collections import Counter

import pytest
from family_checks import convert, published, rank_files, read_config, translate, translated_fields
from phireg_plugins.phi4 import FAMILY as PHI4
from phireg_plugins.phi4_mini import FAMILY as PHI4_MINI
from phireg_plugins.phi35_mini import FAMILY as PHI35_MINI
from phireg_plugins.phi35_moe import FAMILY as PHI35_MOE

from phireg import registry
from phireg.config.hf import HFConfig
from phireg.testing import FamilyConformance, write_tiny_model

SHORT, LONG = [1.0, 1.1, 1.3], [1.2, 2.5, 7.0]
COMMON = {
    "num_hidden_layers": 2, "vocab_size": 97, "hidden_act": "silu", "rms_norm_eps": 1e-3,
    "rope_theta": 5000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LONG_ROPE = {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
TINY = {
    "phi3.5-mini": {
        **COMMON, **LONG_ROPE, "hidden_size": 48, "num_attention_heads": 8,
        "num_key_value_heads": 8, "intermediate_size": 20,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    },
    "phi4": {
        **COMMON, "hidden_size": 120, "num_attention_heads": 20, "num_key_value_heads": 10,
        "intermediate_size": 70, "max_position_embeddings": 64, "rope_theta": 250000.0,
    },
    "phi4-mini": {
        **COMMON, **LONG_ROPE, "hidden_size": 48, "num_attention_heads": 6,
        "num_key_value_heads": 2, "intermediate_size": 40, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
    },
}  # fmt: skip
HIDDEN, INNER, EXPERTS = 48, 20, 6
MOE = {
    **COMMON, **LONG_ROPE, "hidden_size": HIDDEN, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": INNER, "sliding_window": 256,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "router_jitter_noise": 0.3,
    "input_jitter_noise": 0.01, "attention_bias": True, "lm_head_bias": True,
    "rope_scaling": {
        "type": "longrope", "short_factor": SHORT, "long_factor": LONG, "short_mscale": 1.1,
        "long_mscale": 1.3, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
PHI3_FAMILIES = ("phi3-mini", "phi3.5-mini", "phi3-medium", "phi4", "phi4-mini")


class TestPhi35Mini(FamilyConformance):
    """Phi-3-mini with long rope."""

    family = PHI35_MINI
    tiny = TINY["phi3.5-mini"]


class TestPhi4(FamilyConformance):
    """Grouped heads that divide by five."""

    family = PHI4
    tiny = TINY["phi4"]
    tp_sizes = (1, 5)


class TestPhi4Mini(FamilyConformance):
    """A tied head, heads of 8 dimensions of which 6 are rotated, long rope: 3 factors."""

    family = PHI4_MINI
    tiny = TINY["phi4-mini"]


class TestPhi35MoE(FamilyConformance):
    """Experts, of which a large epsilon lets several share in a token's weight."""

    family = PHI35_MOE
    tp_sizes = (1, 4)
    tiny = MOE

    def expected_rows(self, module):
        """Experts one after the other, up before gate."""
        layer, _, name = module.partition(".mlp.")
        source = f"{layer.replace('transformer', 'model')}.block_sparse_moe.experts"
        if name == "fc":
            parts = [f"{source}.{e}.{w}" for e in range(EXPERTS) for w in ("w3", "w1")]
            return [(part, row) for part in parts for row in range(INNER)]
        if name == "proj":
            return [(f"{source}.{e}.w2", row) for e in range(EXPERTS) for row in range(HIDDEN)]
        return None


MODELS = {"phi-3.5-mini": "phi3.5-mini", "phi-4": "phi4", "phi-4-mini": "phi4-mini"}


@pytest.mark.parametrize("model", MODELS)
def test_published_configs(model):
    """Every key is known, and auto finds the family."""
    config = published(model)
    choice = registry.choose(HFConfig(config))
    assert choice.family.name == MODELS[model]
    translation = translate(choice.family, config)
    assert translation.fields == translated_fields(model)
    partly = ["partial_rotary_factor"] if model == "phi-4-mini" else []
    assert [finding.subject for finding in translation.findings] == partly


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("phi-4", {"rope_theta": 500000.0, "max_position_embeddings": 32768}),  # reasoning
        ("phi-4", {"vocab_size": 100360, "eos_token_id": 100265, "rope_theta": 1e6}),
        ("phi-4", {"rope_theta": 10000.0, "max_position_embeddings": 131072}),
        ("phi-4-mini", {"vocab_size": 200069, "tie_word_embeddings": False, "eos_token_id": 0}),
        ("phi-4-mini", {"partial_rotary_factor": 1.0, "rope_scaling": None}),
        ("phi-3.5-mini", {"vocab_size": 32070, "eos_token_id": [32000, 32007]}),
    ],
)
def test_a_fine_tune_may_change_several_numbers(model, changes):
    config = {**published(model), **changes}
    assert registry.choose(HFConfig(config)).family.name == MODELS[model]


def test_each_published_config_is_its_familys():
    """Phi-3.5-mini's without its rope factors is Phi-3-mini-128k's."""
    told = Counter()
    for name in PHI3_FAMILIES:
        for model in registry.load(name).family.published:
            found = registry.choose(HFConfig(model.config)).family.name
            assert found == ("phi3-mini" if name == "phi3.5-mini" else name), model.repo_id
            told[name] += 1
    assert told == {"phi3-mini": 2, "phi3.5-mini": 1, "phi3-medium": 2, "phi4": 3, "phi4-mini": 2}


@pytest.mark.parametrize("broken", [{"rope_scaling": [1]}, {"num_key_value_heads": {}}, {
    "rope_scaling": {"type": "longrope", "long_factor": 3}}, {"eos_token_id": [1, 2]}])  # fmt: skip
def test_values_of_any_kind_are_told_apart(broken):
    config = HFConfig({**published("phi-4"), **broken})
    assert registry.choose(config).family.name in PHI3_FAMILIES


@pytest.mark.parametrize("model", TINY)
def test_a_wrong_choice_changes_no_byte(model, tmp_path):
    """Every family of Phi-3's architecture writes the same config.json and rank files."""
    source = tmp_path / "source"
    write_tiny_model(PHI4, TINY[model], source)
    results = []
    for family in PHI3_FAMILIES:
        place = tmp_path / family
        convert(source, place, family=family, tp_size=2)
        results.append((rank_files(place), read_config(place)))
        assert json.loads((place / "phireg.json").read_text())["family"]["name"] == family
    assert all(result == results[0] for result in results)
    assert len(results[0][0]) == 2
