"""Phi-3-mini and medium, which is mini with shared KV heads, against hand-written expectations."""

import math

import pytest
import torch
from family_checks import (
    LayoutChecks,
    as_transformers5,
    assert_ranks,
    convert,
    errors,
    published,
    read_config,
    subjects,
    translate,
    translated_fields,
    without,
    write_source,
    write_sparse,
)
from phi3_models import HIDDEN, expected, separate, source_shapes, tiny
from phireg_plugins.phi3_medium import FAMILY as MEDIUM
from phireg_plugins.phi3_mini import FAMILY

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
        {**MINI_128K, "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0}},
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
        ({**MINI_4K, "head_dim": 95}, "rotary_embedding_dim"),
        (
            {**MINI_4K, "rope_parameters": PLAIN_ROPE, "partial_rotary_factor": 0.5},
            "rotary_pct",
        ),
        (rope(type="linear", factor=2.0), "rope_scaling"),
        (factors(type="yarn"), "rope_scaling"),
        (factors(rope_type="yarn"), "rope_scaling"),  # su and yarn at once
        (factors(type=None), "rope_scaling"),
        (factors(short_factor=SHORT[:-1]), "rope_scaling"),
        (factors(short_factor=[]), "rope_scaling"),
        (factors(long_factor=None), "rope_parameters.long_factor"),
        (factors(long_factor=[*LONG[1:], math.nan]), "rope_scaling"),
        (factors(attention_factor=1.0), "rope_scaling"),
        (factors(long_mscale=1.3), "rope_scaling"),
        (factors(factor=16.0), "rope_scaling.factor"),
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


class TestMapping(LayoutChecks):
    family, large, kv_heads = "phi3-mini", "phi-3-mini-128k", 8
    complete = (("phi-3-mini-4k", MINI_4K), ("phi-3-mini-128k", MINI_128K))
    complete += (("phi-3-mini-128k", as_transformers5(MINI_128K, **LONG_ROPE)),)
    complete_size = (7_642_159_104, 6 * 32 + 3)
    source_shapes = staticmethod(source_shapes)
    tp_sizes = (1, 2, 4, 8)
    vocabularies = (89, 128, 103)

    def write(self, directory, dtype="float32", vocab=None, **changes):
        return tiny(directory, self.kv_heads, dtype, vocab, **changes)

    def expected(self, state, tp):
        return expected(state, self.kv_heads, tp)

    def layouts(self, state, config):
        """With a head of which config.json says nothing."""
        return ((separate(state, self.kv_heads), without(config, "tie_word_embeddings")),)


class TestMediumMapping(TestMapping):
    """Two KV heads, of which each rank holds at least one."""

    family, bases, large, kv_heads = "phi3-medium", ("phi3_mini",), "phi-3-medium-128k", 2
    complete = (("phi-3-medium-4k", MEDIUM_4K), ("phi-3-medium-128k", MEDIUM_128K))
    complete_size = (27_920_476_160, 6 * 40 + 3)


def test_missing_and_surplus_tensors_are_named(tmp_path):
    """Part of a separate projection, and a bias that the family does not know."""
    state = tiny(tmp_path / "hf", 8)
    config = read_config(tmp_path / "hf")
    lost, bias = (f"model.layers.1.self_attn.{name}" for name in ("v_proj.weight", "o_proj.bias"))
    tensors = {**without(separate(state, 8), lost), bias: torch.ones(HIDDEN)}
    source = write_source(tmp_path / "lost", config, tensors)
    assert errors(source, family="phi3-mini")[0] == {("missing", lost), ("unmapped", bias)}


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


class TestConformance(FamilyConformance):
    family = FAMILY
    tp_sizes = (1, 2, 4)
    tiny = without(MINI_128K, "auto_map") | {
        "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 103,
        "num_hidden_layers": 3, "intermediate_size": 64, "rms_norm_eps": 1e-2,
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
        return [(source, row) for row in (*range(64, 128), *range(64))]


# --- medium ----------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_the_kv_heads_are_refused(tmp_path):
    source = write_sparse(tmp_path / "hf", MEDIUM_4K, source_shapes(MEDIUM_4K))
    for tp in (4, 8):
        codes, _ = errors(source, family="phi3-medium", tp_size=tp)
        assert codes == {("sharding", f"transformer.layers.{i}.attention.qkv") for i in range(40)}
        # 20 and 40 ranks hold one KV head each, several ranks the same one.
        plan = phireg.plan(source, family="phi3-medium", tp_size=tp)
        assert plan.tp_sizes == (1, 2, 5, 10, 20, 40)


def test_published_bytes_per_rank_of_medium(tmp_path):
    source = write_sparse(tmp_path / "hf", MEDIUM_4K, source_shapes(MEDIUM_4K))
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
