"""Phi-3-small: its config table, mapping and quant rules, against hand-written expectations."""

import math

import pytest
import torch
from family_checks import (
    DTYPES,
    MappingChecks,
    assert_ranks,
    convert,
    errors,
    kv_share,
    published,
    read_config,
    share,
    subjects,
    translate,
    translated_fields,
    vocab_share,
    without,
    write_source,
)
from phireg_plugins.phi3_small import FAMILY
from tiny_phi3_small import random_tensors, source_shapes

import phireg
from phireg.findings import Severity
from phireg.testing import FamilyConformance

SMALL_8K, SMALL_128K = published("phi-3-small-8k"), published("phi-3-small-128k")
FIELDS_8K = translated_fields("phi-3-small-8k")
FIELDS_128K = translated_fields("phi-3-small-128k")
BLOCK = SMALL_128K["rope_scaling"]
SHORT = BLOCK["short_factor"]
SMALL_8K_V5 = {
    **without(SMALL_8K, "torch_dtype"),
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "transformers_version": "5.23.0",
}


NO_SIZE = {**SMALL_8K, "ff_intermediate_size": None}


def long_rope(**changes):
    """The 128k model with changes to its rope block; None removes a key."""
    block = {key: value for key, value in {**BLOCK, **changes}.items() if value is not None}
    return {**SMALL_128K, "rope_scaling": block}


# --- config ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL_8K, SMALL_8K_V5], ids=["v4", "v5"])
def test_published_8k(config):
    translation = translate(FAMILY, config)
    assert translation.findings == ()
    assert translation.fields == FIELDS_8K


@pytest.mark.parametrize(
    "config",
    [
        SMALL_128K,
        long_rope(type="longrope"),
        long_rope(type=None, rope_type="longrope"),
        {**SMALL_128K, "rope_position_scale": 2.0},  # unused with long rope
        without(SMALL_128K, "original_max_position_embeddings"),
        long_rope(original_max_position_embeddings=None),
        {
            **without(SMALL_128K, "torch_dtype", "rope_scaling"),
            "dtype": "bfloat16",
            "rope_parameters": {**BLOCK, "rope_type": "longrope", "rope_theta": 1000000},
        },
    ],
)
def test_published_128k(config):
    translation = translate(FAMILY, config)
    assert translation.findings == ()
    assert translation.fields == FIELDS_128K


def test_a_shorter_limit_stays_long_rope():
    fields = translate(FAMILY, {**SMALL_128K, "max_position_embeddings": 16384}).fields
    assert fields == {**FIELDS_128K, "max_position_embeddings": 16384}


def test_mscales_that_are_not_stated():
    formula = math.sqrt(1 + math.log(131072 / 8192) / math.log(8192))
    for value in (None, 0, -1.0):
        fields = translate(FAMILY, long_rope(short_mscale=value, long_mscale=value)).fields
        assert fields["longrope_short_mscale"] == 1.0  # unlike Phi-3-mini's
        assert fields["longrope_long_mscale"] == pytest.approx(formula, rel=1e-15)


def test_absent_keys_are_the_class_defaults():
    kept = ("architectures", "model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    kept += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    translation = translate(FAMILY, {key: SMALL_8K[key] for key in kept})
    assert translation.findings == ()
    assert translation.fields == FIELDS_8K


@pytest.mark.parametrize(
    "key, stated, value",
    [
        ("gegelu_limit", None, None),
        ("mup_embedding_multiplier", None, 0.0),
        ("mup_width_multiplier", None, 1.0),
        ("dense_attention_every_n_layers", None, 33),  # more than there are layers
        ("dense_attention_every_n_layers", 0, 33),
    ],
)
def test_null_is_not_absence(key, stated, value):
    """Null means "none of it", in words the reader understands; absence means the default."""
    fields = translate(FAMILY, {**SMALL_8K, key: stated}).fields
    assert fields == {**FIELDS_8K, key: value}
    assert translate(FAMILY, without(SMALL_8K, key)).fields == FIELDS_8K


@pytest.mark.parametrize(
    "stated, multiplier, padded, size",
    [
        (22, None, True, 22),  # stated sizes are not rounded
        (None, 5, True, 13824),  # 5 * (4096 // 3) * 2 = 13650
        (None, 5, False, 13650),
        (None, 3.75, False, 10237),  # int(10237.5), rounded once
    ],
)
def test_intermediate_size(stated, multiplier, padded, size):
    config = {
        **SMALL_8K,
        "ff_intermediate_size": stated,
        "ff_dim_multiplier": multiplier,
        "gegelu_pad_to_256": padded,
    }
    assert translate(FAMILY, config).fields["intermediate_size"] == size


@pytest.mark.parametrize(
    "config, subject",
    [
        ({**SMALL_8K, "hidden_act": "silu"}, "hidden_act"),
        ({**SMALL_8K, "mup_attn_multiplier": 2.0}, "mup_attn_multiplier"),
        ({**SMALL_8K, "mup_use_scaling": False}, "mup_use_scaling"),
        ({**SMALL_8K, "mup_width_multiplier": 0.0}, "mup_width_multiplier"),
        ({**SMALL_8K, "mup_embedding_multiplier": "x"}, "mup_embedding_multiplier"),
        ({**SMALL_8K, "rope_position_scale": 2.0}, "rope_position_scale"),
        (NO_SIZE, "intermediate_size"),
        ({**SMALL_8K, "ff_intermediate_size": -1}, "intermediate_size"),
        ({**NO_SIZE, "ff_dim_multiplier": "x"}, "intermediate_size"),
        ({**SMALL_8K, "num_key_value_heads": 7}, "num_key_value_heads"),
        ({**SMALL_8K, "dense_attention_every_n_layers": -1}, "dense_attention"),
        ({**SMALL_8K, "blocksparse_vert_stride": 0}, "blocksparse_vert_stride"),
        ({**SMALL_8K, "hidden_size": 32 * 127}, "rotary_embedding_dim"),
        (
            {**SMALL_8K, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
        ({**SMALL_8K, "rope_theta": 1e4}, "rope_embedding_base"),
        (long_rope(type="yarn"), "rope_scaling"),
        (long_rope(type=None), "rope_scaling"),
        (long_rope(short_factor=SHORT[1:]), "rope_scaling"),
        (long_rope(long_mscale="x"), "longrope_long_mscale"),
        (long_rope(factor=32.0), "rope_scaling.factor"),
        (long_rope(attention_factor=1.1), "rope_scaling.attention_factor"),
        (
            without(
                long_rope(original_max_position_embeddings=None),
                "original_max_position_embeddings",
            ),
            "rope_parameters.original_max_position_embeddings",
        ),
        (
            {**SMALL_128K, "original_max_position_embeddings": 4096},
            "rope_scaling.original_max_position_embeddings",
        ),
    ],
)
def test_refused(config, subject):
    assert any(name.startswith(subject) for name in subjects(translate(FAMILY, config)))


@pytest.mark.parametrize(
    "change, subject",
    [({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"), ({"hidden_size": 2048}, "head_size")],
)
def test_warnings(change, subject):
    translation = translate(FAMILY, {**SMALL_8K, **change})
    assert translation.ok
    assert subject in subjects(translation, Severity.WARNING)


# --- weights ---------------------------------------------------------------------------------

LAYERS, HEADS, KV_HEADS, SIZE, INNER, VOCAB = 2, 8, 2, 6, 24, 101
HIDDEN = HEADS * SIZE
TINY = {
    **SMALL_8K,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "ff_intermediate_size": INNER,
    "vocab_size": VOCAB,
}


def random_state(config=TINY, dtype="float32"):
    return {name: t.to(DTYPES[dtype]) for name, t in random_tensors(config).items()}


def de_interleave(tensor, kv_heads=KV_HEADS):
    """Rows [groups, heads of q, k, v] as all of q, all of k, all of v."""
    per_group = HEADS // kv_heads
    grouped = tensor.reshape(kv_heads, per_group + 2, SIZE, *tensor.shape[1:])
    q, k, v = grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1]
    return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)


def expected(state, tp, kv_heads=KV_HEADS, head="model.embed_tokens.weight"):
    ranks = []
    for rank in range(tp):
        tensors = {
            "transformer.vocab_embedding.weight": state["model.embed_tokens.weight"],
            "lm_head.weight": vocab_share(state[head], tp, rank),
        }
        for kind in ("weight", "bias"):
            tensors[f"transformer.ln_f.{kind}"] = state[f"model.final_layernorm.{kind}"]
            for i in range(LAYERS):
                old, new = f"model.layers.{i}", f"transformer.layers.{i}"
                q, k, v = de_interleave(state[f"{old}.self_attn.query_key_value.{kind}"], kv_heads)
                kv = [kv_share(part, kv_heads, tp, rank) for part in (k, v)]
                up = state[f"{old}.mlp.up_proj.{kind}"]
                post = state[f"{old}.post_attention_layernorm.{kind}"]
                tensors |= {
                    f"{new}.input_layernorm.{kind}": state[f"{old}.input_layernorm.{kind}"],
                    f"{new}.post_layernorm.{kind}": post,
                    f"{new}.attention.qkv.{kind}": torch.cat([share(q, tp, rank), *kv]),
                    # gelu and linear rows alternate: whole pairs lie in a contiguous slice
                    f"{new}.mlp.fc.{kind}": share(up, tp, rank),
                }
                dense, down = f"{old}.self_attn.dense.{kind}", f"{old}.mlp.down_proj.{kind}"
                for name, tensor in (("attention.dense", dense), ("mlp.proj", down)):
                    whole = state[tensor]
                    cut = share(whole, tp, rank, dim=1) if kind == "weight" else whole
                    tensors[f"{new}.{name}.{kind}"] = cut
        ranks.append(tensors)
    return ranks


class TestMapping(MappingChecks):
    family, large = "phi3-small", "phi-3-small-128k"
    complete = (("phi-3-small-8k", SMALL_8K), ("phi-3-small-8k", SMALL_8K_V5))
    complete += (("phi-3-small-128k", SMALL_128K),)
    complete_size = (14_784_544_768, 12 * 32 + 4)  # the tied head is not read twice
    source_shapes = staticmethod(source_shapes)
    tp_sizes = (1, 2, 4, 8)
    vocabularies = (96, 97, 103)
    warnings = ("head_size",)

    def write(self, directory, dtype="float32", vocab=VOCAB, **changes):
        config = {**TINY, "torch_dtype": dtype, "vocab_size": vocab, **changes}
        state = random_state(config, dtype)
        write_source(directory, config, state)
        return state

    def expected(self, state, tp):
        return expected(state, tp)


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
@pytest.mark.parametrize("tp", [1, 4])
def test_other_groupings(tmp_path, kv_heads, tp):
    config = {**TINY, "num_key_value_heads": kv_heads}
    state = random_state(config)
    source = write_source(tmp_path / "hf", config, state)
    convert(source, tmp_path / "out", family="phi3-small", dtype="float32", tp_size=tp)
    assert_ranks(tmp_path / "out", expected(state, tp, kv_heads), "float32")


def test_pairs_of_rows_stay_on_one_rank(tmp_path):
    """40 rows are 20 pairs: 8 ranks could share the rows, and would cut pairs."""
    config = {**TINY, "ff_intermediate_size": 20}
    source = write_source(tmp_path / "hf", config, random_state(config))
    codes, findings = errors(source, family="phi3-small", tp_size=8)
    layers = range(LAYERS)
    assert {subject for code, subject in codes if code == "sharding"} == {
        f"transformer.layers.{i}.{name}" for i in layers for name in ("mlp.fc", "mlp.proj")
    }
    fc = next(f for f in findings if f.subject.endswith("mlp.fc"))
    assert phireg.plan(source, family="phi3-small").tp_sizes == (1, 2, 4)
    assert fc.where.startswith("phi3_small/weights.py:")


def test_untied_head(tmp_path):
    config, state = {**TINY, "tie_word_embeddings": False}, random_state()
    headless = write_source(tmp_path / "headless", config, state)
    assert errors(headless, family="phi3-small")[0] == {("missing", "lm_head.weight")}
    state["lm_head.weight"] = torch.randn(VOCAB, HIDDEN)
    source = write_source(tmp_path / "hf", config, state)
    convert(source, tmp_path / "out", family="phi3-small", dtype="float32", tp_size=2)
    assert_ranks(tmp_path / "out", expected(state, 2, head="lm_head.weight"), "float32")
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False


class TestConformance(FamilyConformance):
    family = FAMILY
    tp_sizes = (1, 2, 4)
    tiny = without(SMALL_8K, "auto_map") | {
        "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 107,
        "num_hidden_layers": 3, "ff_intermediate_size": 88, "gegelu_pad_to_256": False,
        "max_position_embeddings": 131072, "rope_embedding_base": 5000.0, "gegelu_limit": 0.5,
        "blocksparse_block_size": 4, "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 5, "layer_norm_epsilon": 1e-2, "mup_width_multiplier": 3.0,
        "mup_embedding_multiplier": 7.0, "torch_dtype": "float32",
        "rope_scaling": {
            "type": "su", "short_factor": [1.1, 1.2, 1.4, 1.7, 2.1, 2.6],
            "long_factor": [2.0, 5.0, 9.5, 3.0, 12.0, 30.0], "short_mscale": 1.1,
            "long_mscale": 1.4, "original_max_position_embeddings": 52,
        },
    }  # fmt: skip

    def expected_rows(self, module):
        """Groups of two query heads, a key head and a value head, each of 12 rows."""
        if not module.endswith("attention.qkv"):
            return None
        source = f"model.layers.{module.split('.')[2]}.self_attn.query_key_value"
        query = [4 * group + head for group in range(4) for head in (0, 1)]
        heads = [*query, *(4 * group + 2 for group in range(4)), *range(3, 16, 4)]
        return [(source, 12 * head + row) for head in heads for row in range(12)]
