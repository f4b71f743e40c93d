"""Phi-3-mini: its config table and its mapping, against hand-written expectations."""

import json
import math

import pytest
import torch
from family_checks import (
    CASTS,
    as_transformers5,
    assert_ranks,
    assert_stands_alone,
    convert,
    errors,
    rank_files,
    reported,
    translate,
    without,
    write_source,
    write_sparse,
)
from phi3_models import LAYERS, expected, separate, source_shapes, tiny
from phireg_plugins.phi3_mini import FAMILY
from safetensors.torch import load_file

import phireg
from phireg.findings import Severity
from phireg.testing import FamilyConformance

MINI_4K = {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "attention_bias": False,
    "vocab_size": 32064,
}
SHORT = [1.1 + 0.04 * i for i in range(48)]
LONG = [1.0700000524520874, 2.000000000000001, *(3.0 + 1.3 * i for i in range(46))]
MINI_128K = {
    **MINI_4K,
    "max_position_embeddings": 131072,
    "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
    "sliding_window": 262144,
}
PLAIN_ROPE = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
LONG_ROPE = {
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "rope_type": "longrope",
    "type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 4096,
}
EXPECTED_4K = {
    "architecture": "Phi3ForCausalLM",
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_size": 96,
    "vocab_size": 32064,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "hidden_act": "swiglu",
    "norm_epsilon": 1e-05,
    "position_embedding_type": "rope_gpt_neox",
    "rotary_base": 10000.0,
    "rotary_pct": 1.0,
    "partial_rotary_factor": 1.0,
    "rotary_embedding_dim": 96,
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
# What TensorRT-LLM's Phi-3 model reads without a usable default, 0.12 to 1.3.0rc20.
REQUIRED = {
    *("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "intermediate_size", "max_position_embeddings"),
    *("hidden_act", "norm_epsilon", "position_embedding_type", "rotary_base", "rotary_pct"),
    *("rotary_scaling", "mapping"),
}
REQUIRED_LONG = {
    *REQUIRED,
    *("original_max_position_embeddings", "longrope_scaling_short_factors"),
    "longrope_scaling_long_factors",
}
EXAMPLE_128K = {
    **{"architecture": "Phi3ForCausalLM", "dtype": "bfloat16", "logits_dtype": "float32"},
    **{"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"head_size": 96, "hidden_act": "swiglu", "norm_epsilon": 1e-05, "rotary_base": 10000.0},
    **{"rotary_scaling": None, "rotary_pct": 1.0, "rotary_embedding_dim": 96},
    **{"tie_word_embeddings": False, "qk_layernorm": False},
    **{"use_parallel_embedding": False, "embedding_sharding_dim": 0},
    **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
    "position_embedding_type": "long_rope",
    "longrope_scaling_short_factors": SHORT,
    "longrope_scaling_long_factors": LONG,
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
}


def rope(**block):
    """mini-128k with another rope block."""
    return {**MINI_128K, "rope_scaling": block}


def test_imports_nothing_but_itself():
    assert_stands_alone("phi3_mini", MINI_128K)


# --- config ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MINI_4K, as_transformers5(MINI_4K, **PLAIN_ROPE)])
def test_published_4k(config):
    translation = translate(FAMILY, config)
    assert translation.fields == EXPECTED_4K
    (finding,) = translation.findings
    assert (finding.severity, finding.subject) == (Severity.NOTE, "sliding_window")
    assert "--max_attention_window_size 2047" in finding.detail


@pytest.mark.parametrize(
    "config",
    [
        MINI_128K,
        rope(type="su", short_factor=SHORT, long_factor=LONG),
        rope(rope_type="longrope", type="su", short_factor=SHORT, long_factor=LONG),
        as_transformers5(MINI_128K, **LONG_ROPE),
        as_transformers5(MINI_128K, **without(LONG_ROPE, "type")),
        as_transformers5(MINI_128K, **{**LONG_ROPE, "rope_type": "su", "type": "su"}),
        as_transformers5(MINI_128K, **without(LONG_ROPE, "original_max_position_embeddings")),
        without(as_transformers5(MINI_128K, **LONG_ROPE), "original_max_position_embeddings"),
        {
            **MINI_128K,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0},
        },
    ],
)
def test_published_128k(config):
    translation = translate(FAMILY, config)
    assert translation.findings == ()
    assert translation.fields == EXPECTED_128K


def test_a_shorter_limit_stays_long_rope():
    fields = translate(FAMILY, {**MINI_128K, "max_position_embeddings": 8192}).fields
    assert fields == {**EXPECTED_128K, "max_position_embeddings": 8192}


def test_a_longer_limit_alone_is_not_long_rope():
    fields = translate(FAMILY, {**MINI_4K, "max_position_embeddings": 131072}).fields
    assert fields == {**EXPECTED_4K, "max_position_embeddings": 131072}


def test_absent_keys_are_the_class_defaults():
    optional = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")
    absent = without(MINI_4K, *optional, "tie_word_embeddings", "original_max_position_embeddings")
    assert translate(FAMILY, absent).fields == EXPECTED_4K
    absent = without(MINI_128K, *optional[:3], "original_max_position_embeddings")
    assert translate(FAMILY, absent).fields == EXPECTED_128K  # 4096, whatever the limit is


@pytest.mark.parametrize(
    "config, subject, says",
    [
        ({**MINI_4K, "hidden_act": "gelu"}, "hidden_act", "silu"),
        ({**MINI_4K, "mlp_bias": True}, "mlp_bias", "no biases"),
        ({**MINI_4K, "lm_head_bias": True}, "lm_head_bias", "no biases"),
        ({**MINI_4K, "num_key_value_heads": 5}, "num_key_value_heads", "32 heads cannot share 5"),
        ({**MINI_4K, "rms_norm_eps": "x"}, "rms_norm_eps", "finite number"),
        ({**MINI_4K, "hidden_size": 32 * 3}, "rotary_embedding_dim", "3 of a head's 3"),
        ({**MINI_4K, "partial_rotary_factor": 0.99}, "rotary_embedding_dim", "95 of"),
        ({**MINI_4K, "partial_rotary_factor": 1.25}, "rotary_embedding_dim", "at most 1"),
        ({**MINI_4K, "head_dim": 95}, "rotary_embedding_dim", "95 of"),
        (
            {**MINI_4K, "rope_parameters": PLAIN_ROPE, "partial_rotary_factor": 0.5},
            "rope_parameters.partial_rotary_factor",
            "partial_rotary_factor is 0.5",
        ),
        (rope(type="linear", factor=2.0), "rope_scaling", "'linear' is not supported"),
        (rope(type="dynamic", factor=2.0), "rope_scaling", "'dynamic' is not supported"),
        (rope(rope_type="llama3", factor=8.0), "rope_scaling", "'llama3' is not supported"),
        (
            rope(type="yarn", short_factor=SHORT, long_factor=LONG),
            "rope_scaling",
            "'yarn' is not supported",
        ),
        (
            rope(type="su", rope_type="yarn", short_factor=SHORT, long_factor=LONG),
            "rope_scaling",
            "different rope types",
        ),
        (rope(short_factor=SHORT, long_factor=LONG), "rope_scaling", "no rope type"),
        (
            rope(type="su", short_factor=SHORT[:-1], long_factor=LONG),
            "rope_scaling",
            "47 short and 48 long factors, not one for each of 48",
        ),
        (
            rope(type="su", short_factor=SHORT * 2, long_factor=LONG * 2),
            "rope_scaling",
            "96 short and 96 long",
        ),
        (rope(type="su", short_factor=[], long_factor=LONG), "rope_scaling", "list of numbers"),
        (rope(type="su", short_factor=SHORT), "rope_parameters.long_factor", "missing"),
        (
            rope(type="su", short_factor=SHORT, long_factor=[*LONG[1:], math.nan]),
            "rope_scaling",
            "finite number",
        ),
        (
            rope(type="su", short_factor=SHORT, long_factor=LONG, attention_factor=1.0),
            "rope_scaling",
            "attention_factor is 1.0, but TensorRT-LLM computes 1.19023",
        ),
        (
            rope(type="su", short_factor=SHORT, long_factor=LONG, attention_factor="1.19"),
            "rope_scaling",
            "attention_factor is '1.19'",
        ),
        (
            rope(type="su", short_factor=SHORT, long_factor=LONG, long_mscale=1.3),
            "rope_scaling",
            "long_mscale is 1.3",
        ),
        (
            rope(type="su", short_factor=SHORT, long_factor=LONG, factor=32.0),
            "rope_scaling.factor",
            "scales by lengths",
        ),
        (
            rope(type="su", short_factor=SHORT, long_factor=LONG, beta_fast=32),
            "rope_scaling.beta_fast",
            "not known",
        ),
        (
            {
                **as_transformers5(MINI_128K, **LONG_ROPE),
                "original_max_position_embeddings": 2048,
            },
            "original_max_position_embeddings",
            "is 2048, but rope_parameters.original_max_position_embeddings is 4096",
        ),
        ({**MINI_128K, "rope_scaling": "longrope"}, "rope_scaling", "not known"),
    ],
)
def test_refused(config, subject, says):
    translation = translate(FAMILY, config)
    assert not translation.ok
    found = reported(translation)
    matching = {key: detail for key, detail in found.items() if key.startswith(subject)}
    assert says in "; ".join(matching.values()), found


def test_a_stated_factor_that_the_reader_computes_too_is_fine():
    used = math.sqrt(1 + math.log(32) / math.log(4096))
    config = rope(type="longrope", short_factor=SHORT, long_factor=LONG, attention_factor=used)
    assert translate(FAMILY, config).fields == EXPECTED_128K
    assert translate(FAMILY, config).findings == ()


def test_partial_rotation_is_a_warning():
    factors = {"short_factor": SHORT[:36], "long_factor": LONG[:36]}
    config = {**rope(type="longrope", **factors), "partial_rotary_factor": 0.75}
    translation = translate(FAMILY, config)
    assert translation.ok
    assert translation.fields["rotary_embedding_dim"] == 72
    assert "1.0 and later" in reported(translation, Severity.WARNING)["partial_rotary_factor"]


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("source_dtype, dtype, result", CASTS)
def test_rank_files(tmp_path, source_dtype, dtype, result, tp):
    state = tiny(tmp_path / "hf", 8, source_dtype)
    plan = convert(tmp_path / "hf", tmp_path / "out", family="phi3-mini", dtype=dtype, tp_size=tp)
    assert plan.findings == ()
    assert_ranks(tmp_path / "out", expected(state, 8, tp), result)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == result
    assert written["mapping"] == {"world_size": tp, "tp_size": tp, "pp_size": 1}


def test_long_rope_as_transformers_saves_it(tmp_path):
    block = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]}
    state = tiny(
        *(tmp_path / "hf", 8),
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_scaling=block,
    )
    plan = convert(tmp_path / "hf", tmp_path / "out", family="phi3-mini")
    assert plan.findings == ()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["position_embedding_type"] == "long_rope"
    assert written["original_max_position_embeddings"] == 64
    assert written["longrope_scaling_long_factors"] == [2.0, 3.0, 4.0]
    assert_ranks(tmp_path / "out", expected(state, 8, 1), "float16")


@pytest.mark.parametrize("vocab", [89, 128, 103])
def test_resized_vocabulary(tmp_path, vocab):
    state = tiny(tmp_path / "hf", 8, resize=vocab)
    assert state["lm_head.weight"].shape[0] == vocab
    convert(tmp_path / "hf", tmp_path / "out", family="phi3-mini", dtype="float32", tp_size=4)
    assert_ranks(tmp_path / "out", expected(state, 8, 4), "float32")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_separate_projections_give_the_same_bytes(tmp_path, tp):
    state = tiny(tmp_path / "hf", 8)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    write_source(tmp_path / "separate", config, separate(state, 8))
    for name in ("hf", "separate"):
        convert(tmp_path / name, tmp_path / f"out-{name}", family="phi3-mini", tp_size=tp)
    assert rank_files(tmp_path / "out-hf") == rank_files(tmp_path / "out-separate")
    assert_ranks(tmp_path / "out-separate", expected(state, 8, tp), "float16")


def test_fused_and_separate_at_once_are_refused(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    extra = {name: t for name, t in separate(state, 8).items() if name not in state}
    assert len(extra) == 5 * LAYERS
    source = write_source(tmp_path / "both", config, {**state, **extra})
    found, _ = errors(source, family="phi3-mini")
    assert found == {("unmapped", name) for name in extra}


def test_an_incomplete_separate_projection_is_missing(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    lost = "model.layers.1.self_attn.v_proj.weight"
    source = write_source(tmp_path / "lost", config, without(separate(state, 8), lost))
    assert errors(source, family="phi3-mini")[0] == {("missing", lost)}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("stated", [True, None])
def test_tied_head(tmp_path, tp, stated):
    state = tiny(tmp_path / "hf", 8, tie_word_embeddings=True)
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in saved
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    if stated is None:
        del config["tie_word_embeddings"]
    source = write_source(tmp_path / "tied", config, saved)
    plan = convert(source, tmp_path / "out", family="phi3-mini", dtype="float32", tp_size=tp)
    assert plan.findings == ()
    assert_ranks(tmp_path / "out", expected(state, 8, tp), "float32")


def test_a_head_that_nothing_is_said_about_is_used(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    source = write_source(tmp_path / "hf2", without(config, "tie_word_embeddings"), state)
    convert(source, tmp_path / "out", family="phi3-mini", dtype="float32")
    assert_ranks(tmp_path / "out", expected(state, 8, 1), "float32")


def test_a_head_of_a_tied_model_is_dropped_with_a_note(tmp_path):
    state = tiny(tmp_path / "hf", 8, tie_word_embeddings=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    other = {**state, "lm_head.weight": torch.full_like(state["lm_head.weight"], 7.0)}
    source = write_source(tmp_path / "both", config, other)
    plan = convert(source, tmp_path / "out", family="phi3-mini", dtype="float32")
    (note,) = plan.findings
    assert (note.severity, note.code, note.subject) == (Severity.NOTE, "dropped", "lm_head.weight")
    assert_ranks(tmp_path / "out", expected(state, 8, 1), "float32")


def test_biases_are_not_lost_in_silence(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    name = "model.layers.0.self_attn.qkv_proj.bias"
    source = write_source(tmp_path / "biased", config, {**state, name: torch.ones(144)})
    assert errors(source, family="phi3-mini")[0] == {("unmapped", name)}


def test_other_files_same_bytes(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    tiny(tmp_path / "sharded", 8, shard="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    for name in ("hf", "sharded", "bin"):
        convert(tmp_path / name, tmp_path / f"out-{name}", family="phi3-mini", tp_size=2)
    assert rank_files(tmp_path / "out-hf") == rank_files(tmp_path / "out-sharded")
    assert rank_files(tmp_path / "out-hf") == rank_files(tmp_path / "out-bin")


@pytest.mark.parametrize("precision, algorithm", [("int8", "W8A16"), ("int4", "W4A16")])
def test_weight_only_leaves_the_weights_raw(tmp_path, precision, algorithm):
    tiny(tmp_path / "hf", 8)
    for name, weight_only in (("plain", None), ("quantized", precision)):
        convert(tmp_path / "hf", tmp_path / name, family="phi3-mini", weight_only=weight_only)
    assert rank_files(tmp_path / "plain") == rank_files(tmp_path / "quantized")
    written = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert written["quantization"] == {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", "*vocab_embedding"],
    }


@pytest.mark.parametrize(
    "config", [MINI_128K, as_transformers5(MINI_128K, **LONG_ROPE)], ids=["v4", "v5"]
)
def test_complete_example(tmp_path, config):
    source = write_sparse(tmp_path / "hf", config, source_shapes(config))
    plan = phireg.plan(source, family="phi3-mini")
    assert plan.findings == ()
    assert plan.bytes_in == 7_642_159_104
    assert {key: plan.config.get(key, "absent") for key in EXAMPLE_128K} == EXAMPLE_128K
    assert set(plan.config) >= REQUIRED_LONG
    assert len(plan.outputs) == 6 * 32 + 3


def test_complete_example_4k(tmp_path):
    source = write_sparse(tmp_path / "hf", MINI_4K, source_shapes(MINI_4K))
    plan = phireg.plan(source, family="phi3-mini", tp_size=2)
    assert set(plan.config) >= REQUIRED
    assert not [key for key in plan.config if key.startswith(("longrope", "original", "moe"))]
    assert plan.config["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    assert plan.config["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": None}


class TestConformance(FamilyConformance):
    family = FAMILY
    tp_sizes = (1, 2, 4)
    tiny = without(MINI_128K, "auto_map") | {
        "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 103,
        "num_hidden_layers": 3, "intermediate_size": 88, "rms_norm_eps": 1e-2,
        "rope_theta": 5000.0, "original_max_position_embeddings": 52, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.1, 1.2, 1.4, 1.7, 2.1, 2.6],
            "long_factor": [2.0, 5.0, 9.5, 3.0, 12.0, 30.0],
        },
    }  # fmt: skip

    def expected_rows(self, module):
        if not module.endswith("mlp.fc"):
            return None
        source = f"model.layers.{module.split('.')[2]}.mlp.gate_up_proj"
        return [(source, row) for row in (*range(88, 176), *range(88))]
