"""Phi-3-mini and medium, which is mini with shared KV heads, against hand-written expectations."""

import math

import pytest
import torch
from family_checks import (
    MappingChecks,
    as_transformers5,
    assert_ranks,
    checkpoint_config,
    convert,
    errors,
    published,
    rank_files,
    read_config,
    subjects,
    translate,
    translated_fields,
    without,
    write_source,
    write_sparse,
)
from phi3_models import LAYERS, expected, separate, source_shapes, tiny
from phireg_plugins.phi3_medium import FAMILY as MEDIUM
from phireg_plugins.phi3_mini import FAMILY
from safetensors.torch import load_file

import phireg
from phireg.findings import Severity
from phireg.testing import FamilyConformance

MINI_4K, MINI_128K = published("phi-3-mini-4k"), published("phi-3-mini-128k")
MEDIUM_4K, MEDIUM_128K = published("phi-3-medium-4k"), published("phi-3-medium-128k")
FIELDS_4K, FIELDS_128K = translated_fields("phi-3-mini-4k"), translated_fields("phi-3-mini-128k")
SHORT = MINI_128K["rope_scaling"]["short_factor"]
LONG = MINI_128K["rope_scaling"]["long_factor"]
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


def rope(**block):
    """mini-128k with another rope block."""
    return {**MINI_128K, "rope_scaling": block}


def factors(**changes):
    """mini-128k with changes to its rope block; None removes a key."""
    block = {"type": "su", "short_factor": SHORT, "long_factor": LONG, **changes}
    return rope(**{key: value for key, value in block.items() if value is not None})


# --- config ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MINI_4K, as_transformers5(MINI_4K, **PLAIN_ROPE)])
def test_published_4k(config):
    translation = translate(FAMILY, config)
    assert translation.fields == FIELDS_4K
    (finding,) = translation.findings
    assert (finding.severity, finding.subject) == (Severity.NOTE, "sliding_window")
    assert "2047" in finding.detail


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
    assert translation.fields == FIELDS_128K


def test_published_medium():
    """The tables of mini, with another model's numbers."""
    fields = translate(MEDIUM, MEDIUM_4K).fields
    assert fields == translated_fields("phi-3-medium-4k")
    translation = translate(MEDIUM, MEDIUM_128K)
    assert translation.findings == ()
    assert translation.fields == translated_fields("phi-3-medium-128k")


@pytest.mark.parametrize(
    "config, fields, limit", [(MINI_128K, FIELDS_128K, 8192), (MINI_4K, FIELDS_4K, 131072)]
)
def test_the_limit_alone_does_not_choose_long_rope(config, fields, limit):
    changed = {"max_position_embeddings": limit}
    assert translate(FAMILY, {**config, **changed}).fields == {**fields, **changed}


def test_absent_keys_are_the_class_defaults():
    optional = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")
    absent = without(MINI_4K, *optional, "tie_word_embeddings", "original_max_position_embeddings")
    assert translate(FAMILY, absent).fields == FIELDS_4K
    absent = without(MINI_128K, *optional[:3], "original_max_position_embeddings")
    assert translate(FAMILY, absent).fields == FIELDS_128K  # 4096, whatever the limit is


@pytest.mark.parametrize(
    "config, subject",
    [
        ({**MINI_4K, "hidden_act": "gelu"}, "hidden_act"),
        ({**MINI_4K, "mlp_bias": True}, "mlp_bias"),
        ({**MINI_4K, "lm_head_bias": True}, "lm_head_bias"),
        ({**MINI_4K, "num_key_value_heads": 5}, "num_key_value_heads"),
        ({**MINI_4K, "rms_norm_eps": "x"}, "rms_norm_eps"),
        ({**MINI_4K, "hidden_size": 32 * 3}, "rotary_embedding_dim"),
        ({**MINI_4K, "partial_rotary_factor": 0.99}, "rotary_embedding_dim"),
        ({**MINI_4K, "partial_rotary_factor": 1.25}, "rotary_embedding_dim"),
        ({**MINI_4K, "head_dim": 95}, "rotary_embedding_dim"),
        (
            {**MINI_4K, "rope_parameters": PLAIN_ROPE, "partial_rotary_factor": 0.5},
            "rope_parameters.partial_rotary_factor",
        ),
        (rope(type="linear", factor=2.0), "rope_scaling"),
        (rope(rope_type="llama3", factor=8.0), "rope_scaling"),
        (factors(type="yarn"), "rope_scaling"),
        (factors(rope_type="yarn"), "rope_scaling"),  # su and yarn at once
        (factors(type=None), "rope_scaling"),
        (factors(short_factor=SHORT[:-1]), "rope_scaling"),
        (factors(short_factor=SHORT * 2, long_factor=LONG * 2), "rope_scaling"),
        (factors(short_factor=[]), "rope_scaling"),
        (factors(long_factor=None), "rope_parameters.long_factor"),
        (factors(long_factor=[*LONG[1:], math.nan]), "rope_scaling"),
        (factors(attention_factor=1.0), "rope_scaling"),
        (factors(attention_factor="1.19"), "rope_scaling"),
        (factors(long_mscale=1.3), "rope_scaling"),
        (factors(factor=32.0), "rope_scaling.factor"),
        (factors(beta_fast=32), "rope_scaling.beta_fast"),
        (
            {**as_transformers5(MINI_128K, **LONG_ROPE), "original_max_position_embeddings": 2048},
            "original_max_position_embeddings",
        ),
        ({**MINI_128K, "rope_scaling": "longrope"}, "rope_scaling"),
    ],
)
def test_refused(config, subject):
    assert any(name.startswith(subject) for name in subjects(translate(FAMILY, config)))


def test_a_stated_factor_that_the_reader_computes_too_is_fine():
    used = math.sqrt(1 + math.log(32) / math.log(4096))
    config = rope(type="longrope", short_factor=SHORT, long_factor=LONG, attention_factor=used)
    assert translate(FAMILY, config).fields == FIELDS_128K
    assert translate(FAMILY, config).findings == ()


def test_partial_rotation_is_a_warning():
    factors = {"short_factor": SHORT[:36], "long_factor": LONG[:36]}
    config = {**rope(type="longrope", **factors), "partial_rotary_factor": 0.75}
    translation = translate(FAMILY, config)
    assert translation.ok
    assert translation.fields["rotary_embedding_dim"] == 72
    assert "partial_rotary_factor" in subjects(translation, Severity.WARNING)


# --- weights ---------------------------------------------------------------------------------


class TestMapping(MappingChecks):
    family, large = "phi3-mini", "phi-3-mini-128k"
    tp_sizes = (1, 2, 4, 8)
    vocabularies = (89, 128, 103)

    def write(self, directory, dtype="float32", vocab=None, **changes):
        return tiny(directory, 8, dtype, vocab, **changes)

    def expected(self, state, tp):
        return expected(state, 8, tp)


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
    written = read_config(tmp_path / "out")
    assert written["position_embedding_type"] == "long_rope"
    assert written["original_max_position_embeddings"] == 64
    assert written["longrope_scaling_long_factors"] == [2.0, 3.0, 4.0]
    assert_ranks(tmp_path / "out", expected(state, 8, 1), "float16")


@pytest.mark.parametrize(
    "family, kv_heads, tp", [("phi3-mini", 8, 4), ("phi3-medium", 2, 2), ("phi3-medium", 2, 8)]
)
def test_separate_projections_give_the_same_bytes(tmp_path, family, kv_heads, tp):
    state = tiny(tmp_path / "hf", kv_heads)
    config = read_config(tmp_path / "hf")
    write_source(tmp_path / "separate", config, separate(state, kv_heads))
    for name in ("hf", "separate"):
        convert(tmp_path / name, tmp_path / f"out-{name}", family=family, tp_size=tp)
    assert rank_files(tmp_path / "out-hf") == rank_files(tmp_path / "out-separate")


def test_fused_and_separate_at_once_are_refused(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    config = read_config(tmp_path / "hf")
    extra = {name: t for name, t in separate(state, 8).items() if name not in state}
    assert len(extra) == 5 * LAYERS
    source = write_source(tmp_path / "both", config, {**state, **extra})
    codes, _ = errors(source, family="phi3-mini")
    assert codes == {("unmapped", name) for name in extra}


def test_an_incomplete_separate_projection_is_missing(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    config = read_config(tmp_path / "hf")
    lost = "model.layers.1.self_attn.v_proj.weight"
    source = write_source(tmp_path / "lost", config, without(separate(state, 8), lost))
    assert errors(source, family="phi3-mini")[0] == {("missing", lost)}


@pytest.mark.parametrize("stated", [True, None])
def test_tied_head(tmp_path, stated):
    state = tiny(tmp_path / "hf", 8, tie_word_embeddings=True)
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in saved
    config = read_config(tmp_path / "hf")
    if stated is None:
        del config["tie_word_embeddings"]
    source = write_source(tmp_path / "tied", config, saved)
    plan = convert(source, tmp_path / "out", family="phi3-mini", dtype="float32", tp_size=4)
    assert plan.findings == ()
    assert_ranks(tmp_path / "out", expected(state, 8, 4), "float32")


def test_a_head_that_nothing_is_said_about_is_used(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    config = read_config(tmp_path / "hf")
    source = write_source(tmp_path / "hf2", without(config, "tie_word_embeddings"), state)
    convert(source, tmp_path / "out", family="phi3-mini", dtype="float32")
    assert_ranks(tmp_path / "out", expected(state, 8, 1), "float32")


def test_biases_are_not_lost_in_silence(tmp_path):
    state = tiny(tmp_path / "hf", 8)
    config = read_config(tmp_path / "hf")
    name = "model.layers.0.self_attn.qkv_proj.bias"
    source = write_source(tmp_path / "biased", config, {**state, name: torch.ones(144)})
    assert errors(source, family="phi3-mini")[0] == {("unmapped", name)}


@pytest.mark.parametrize(
    "config", [MINI_128K, as_transformers5(MINI_128K, **LONG_ROPE)], ids=["v4", "v5"]
)
def test_complete_example(tmp_path, config):
    source = write_sparse(tmp_path / "hf", config, source_shapes(config))
    plan = phireg.plan(source, family="phi3-mini")
    assert plan.findings == ()
    assert plan.bytes_in == 7_642_159_104
    assert plan.config == checkpoint_config("phi-3-mini-128k")
    assert len(plan.outputs) == 6 * 32 + 3


def test_complete_example_4k(tmp_path):
    source = write_sparse(tmp_path / "hf", MINI_4K, source_shapes(MINI_4K))
    plan = phireg.plan(source, family="phi3-mini", tp_size=2)
    two_ranks = {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}}
    assert plan.config == {**checkpoint_config("phi-3-mini-4k"), **two_ranks}


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


# --- medium ----------------------------------------------------------------------------------


class TestMediumMapping(MappingChecks):
    """Two KV heads, of which each rank holds at least one."""

    family, bases, large = "phi3-medium", ("phi3_mini",), "phi-3-medium-128k"
    tp_sizes = (1, 2, 4, 8)

    def write(self, directory, dtype="float32", vocab=None, **changes):
        return tiny(directory, 2, dtype, vocab, **changes)

    def expected(self, state, tp):
        return expected(state, 2, tp)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_four_kv_heads(tmp_path, tp):
    state = tiny(tmp_path / "hf", 4)
    convert(tmp_path / "hf", tmp_path / "out", family="phi3-medium", dtype="float32", tp_size=tp)
    assert_ranks(tmp_path / "out", expected(state, 4, tp), "float32")


@pytest.mark.parametrize("tp", [1, 4])
def test_explicit_mini_gives_the_same_bytes(tmp_path, tp):
    tiny(tmp_path / "hf", 2)
    for family in ("phi3-mini", "phi3-medium"):
        convert(tmp_path / "hf", tmp_path / family, family=family, tp_size=tp)
    assert rank_files(tmp_path / "phi3-mini") == rank_files(tmp_path / "phi3-medium")
    assert read_config(tmp_path / "phi3-mini") == read_config(tmp_path / "phi3-medium")


def test_sizes_that_do_not_fit_the_kv_heads_are_refused(tmp_path):
    source = write_sparse(tmp_path / "hf", MEDIUM_4K, source_shapes(MEDIUM_4K))
    for tp in (4, 8):
        codes, findings = errors(source, family="phi3-medium", tp_size=tp)
        assert codes == {("sharding", f"transformer.layers.{i}.attention.qkv") for i in range(40)}
        # 20 and 40 ranks hold one KV head each, several ranks the same one.
        assert "1, 2, 5, 10, 20, 40" in findings[0].detail


def test_published_bytes_of_medium(tmp_path):
    source = write_sparse(tmp_path / "hf", MEDIUM_4K, source_shapes(MEDIUM_4K))
    plan = phireg.plan(source, family="phi3-medium")
    assert plan.bytes_in == 27_920_476_160
    assert plan.config == checkpoint_config("phi-3-medium-4k")
    plan = phireg.plan(source, family="phi3-medium", tp_size=2)
    embedding = 32064 * 5120 * 2  # whole on every rank, where the figure divides it
    for header, size in zip(plan.headers, plan.file_sizes, strict=True):
        assert size - len(header) == 13_960_652_800 + embedding // 2


class TestMediumConformance(FamilyConformance):
    """Two KV heads, which at TP 4 stand on two ranks each."""

    family = MEDIUM
    tp_sizes = (1, 2, 4)
    tiny = without(MEDIUM_4K, "auto_map") | {
        "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 105,
        "num_hidden_layers": 3, "intermediate_size": 72, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-2, "rope_theta": 5000.0, "sliding_window": 40,
        "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
