"""Phi-3-medium: mini's tables with shared KV heads, which may be fewer than the ranks."""

import json

import pytest
from family_checks import (
    CASTS,
    as_transformers5,
    assert_ranks,
    assert_stands_alone,
    convert,
    errors,
    rank_files,
    translate,
    without,
    write_source,
    write_sparse,
)
from phi3_models import expected, separate, source_shapes, tiny
from phireg_plugins.phi3_medium import FAMILY

import phireg
from phireg.findings import Severity
from phireg.testing import FamilyConformance

MEDIUM_4K = {
    "_name_or_path": "Phi-3-medium-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17920,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "vocab_size": 32064,
}
SHORT = [1.0 + 0.01 * i for i in range(64)]
LONG = [1.0 + 0.5 * i for i in range(64)]
MEDIUM_128K = {
    **MEDIUM_4K,
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG},
    "sliding_window": 131072,
}
EXPECTED_4K = {
    "architecture": "Phi3ForCausalLM",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "head_size": 128,
    "vocab_size": 32064,
    "intermediate_size": 17920,
    "max_position_embeddings": 4096,
    "hidden_act": "swiglu",
    "norm_epsilon": 1e-05,
    "position_embedding_type": "rope_gpt_neox",
    "rotary_base": 10000.0,
    "rotary_pct": 1.0,
    "partial_rotary_factor": 1.0,
    "rotary_embedding_dim": 128,
    "rotary_scaling": None,
    "tie_word_embeddings": False,
    "logits_dtype": "float32",
    "qk_layernorm": False,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "share_embedding_table": False,
}
EXPECTED_128K = {
    **EXPECTED_4K,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "position_embedding_type": "long_rope",
    "longrope_scaling_short_factors": SHORT,
    "longrope_scaling_long_factors": LONG,
}


def test_imports_nothing_but_itself_and_its_base():
    assert_stands_alone("phi3_medium", MEDIUM_4K, "phi3_mini")


def test_published_4k():
    plain = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    for config in (MEDIUM_4K, as_transformers5(MEDIUM_4K, **plain)):
        translation = translate(FAMILY, config)
        assert translation.fields == EXPECTED_4K
        assert [(f.severity, f.subject) for f in translation.findings] == [
            (Severity.NOTE, "sliding_window")
        ]


def test_published_128k():
    block = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    v5 = as_transformers5(MEDIUM_128K, rope_theta=10000.0, partial_rotary_factor=1.0, **block)
    for config in (MEDIUM_128K, v5):
        translation = translate(FAMILY, config)
        assert translation.findings == ()
        assert translation.fields == EXPECTED_128K


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("source_dtype, dtype, result", CASTS)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_rank_files(tmp_path, kv_heads, source_dtype, dtype, result, tp):
    state = tiny(tmp_path / "hf", kv_heads, source_dtype)
    plan = convert(tmp_path / "hf", tmp_path / "out", family="phi3-medium", dtype=dtype, tp_size=tp)
    assert plan.findings == ()
    assert_ranks(tmp_path / "out", expected(state, kv_heads, tp), result)


@pytest.mark.parametrize("tp", [2, 8])
def test_separate_projections_give_the_same_bytes(tmp_path, tp):
    state = tiny(tmp_path / "hf", 2)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    write_source(tmp_path / "separate", config, separate(state, 2))
    for name in ("hf", "separate"):
        convert(tmp_path / name, tmp_path / f"out-{name}", family="phi3-medium", tp_size=tp)
    assert rank_files(tmp_path / "out-hf") == rank_files(tmp_path / "out-separate")


@pytest.mark.parametrize("tp", [1, 4])
def test_explicit_mini_gives_the_same_bytes(tmp_path, tp):
    tiny(tmp_path / "hf", 2)
    for family in ("phi3-mini", "phi3-medium"):
        convert(tmp_path / "hf", tmp_path / family, family=family, tp_size=tp)
    assert rank_files(tmp_path / "phi3-mini") == rank_files(tmp_path / "phi3-medium")
    mini, medium = (
        (tmp_path / family / "config.json").read_bytes() for family in ("phi3-mini", "phi3-medium")
    )
    assert mini == medium


def test_sizes_that_do_not_fit_the_kv_heads_are_refused(tmp_path):
    source = write_sparse(tmp_path / "hf", MEDIUM_4K, source_shapes(MEDIUM_4K))
    for tp in (4, 8):
        found, findings = errors(source, family="phi3-medium", tp_size=tp)
        assert found == {("sharding", f"transformer.layers.{i}.attention.qkv") for i in range(40)}
        assert {f.detail.split(":")[0] for f in findings} == {"part 'k'", "part 'v'"}
        # 20 and 40 ranks hold one KV head each, several ranks the same one.
        assert "tp sizes that work: 1, 2, 5, 10, 20, 40" in findings[0].detail


def test_published_bytes(tmp_path):
    source = write_sparse(tmp_path / "hf", MEDIUM_4K, source_shapes(MEDIUM_4K))
    plan = phireg.plan(source, family="phi3-medium")
    assert plan.bytes_in == 27_920_476_160
    assert {key: plan.config[key] for key in EXPECTED_4K} == EXPECTED_4K
    plan = phireg.plan(source, family="phi3-medium", tp_size=2)
    embedding = 32064 * 5120 * 2  # whole on every rank, where the figure divides it
    for header, size in zip(plan.headers, plan.file_sizes, strict=True):
        assert size - len(header) == 13_960_652_800 + embedding // 2


class TestConformance(FamilyConformance):
    """Two KV heads, which at TP 4 stand on two ranks each."""

    family = FAMILY
    tp_sizes = (1, 2, 4)
    tiny = without(MEDIUM_4K, "auto_map") | {
        "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 105,
        "num_hidden_layers": 3, "intermediate_size": 72, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-2, "rope_theta": 5000.0, "sliding_window": 40,
        "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
