"""Phi-3-medium: mini's tables with shared KV heads, which may be fewer than the ranks."""

import pytest
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
    translate,
    translated_fields,
    without,
    write_source,
    write_sparse,
)
from phi3_models import expected, separate, source_shapes, tiny
from phireg_plugins.phi3_medium import FAMILY

import phireg
from phireg.findings import Severity
from phireg.testing import FamilyConformance

MEDIUM_4K, MEDIUM_128K = published("phi-3-medium-4k"), published("phi-3-medium-128k")


def test_published_4k():
    plain = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    for config in (MEDIUM_4K, as_transformers5(MEDIUM_4K, **plain)):
        translation = translate(FAMILY, config)
        assert translation.fields == translated_fields("phi-3-medium-4k")
        assert [(f.severity, f.subject) for f in translation.findings] == [
            (Severity.NOTE, "sliding_window")
        ]


def test_published_128k():
    block = {**without(MEDIUM_128K["rope_scaling"], "type"), "rope_type": "longrope"}
    v5 = as_transformers5(MEDIUM_128K, rope_theta=10000.0, partial_rotary_factor=1.0, **block)
    for config in (MEDIUM_128K, v5):
        translation = translate(FAMILY, config)
        assert translation.findings == ()
        assert translation.fields == translated_fields("phi-3-medium-128k")


class TestMapping(MappingChecks):
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


@pytest.mark.parametrize("tp", [2, 8])
def test_separate_projections_give_the_same_bytes(tmp_path, tp):
    state = tiny(tmp_path / "hf", 2)
    config = read_config(tmp_path / "hf")
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
    assert read_config(tmp_path / "phi3-mini") == read_config(tmp_path / "phi3-medium")


def test_sizes_that_do_not_fit_the_kv_heads_are_refused(tmp_path):
    source = write_sparse(tmp_path / "hf", MEDIUM_4K, source_shapes(MEDIUM_4K))
    for tp in (4, 8):
        codes, findings = errors(source, family="phi3-medium", tp_size=tp)
        assert codes == {("sharding", f"transformer.layers.{i}.attention.qkv") for i in range(40)}
        # 20 and 40 ranks hold one KV head each, several ranks the same one.
        assert "1, 2, 5, 10, 20, 40" in findings[0].detail


def test_published_bytes(tmp_path):
    source = write_sparse(tmp_path / "hf", MEDIUM_4K, source_shapes(MEDIUM_4K))
    plan = phireg.plan(source, family="phi3-medium")
    assert plan.bytes_in == 27_920_476_160
    assert plan.config == checkpoint_config("phi-3-medium-4k")
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
