"""phi-2: its config table and its mapping, against hand-written expectations."""

import pytest
import torch
from family_checks import (
    LayoutChecks,
    as_transformers5,
    assert_ranks,
    convert,
    errors,
    published,
    randomize,
    read_config,
    share,
    subjects,
    translate,
    translated_fields,
    vocab_share,
    without,
    write_source,
    write_sparse,
)
from helpers.other_layouts import fused_per_head, original, sequential
from phireg_plugins.phi2 import FAMILY

import phireg
from phireg.errors import PlanError
from phireg.findings import Severity
from phireg.testing import FamilyConformance

PHI2, FIELDS = published("phi-2"), translated_fields("phi-2")
PHI2_V5 = {
    **as_transformers5(PHI2, rope_theta=10000.0, rope_type="default", partial_rotary_factor=0.4),
    "pad_token_id": None,
    "transformers_version": "5.23.0",
}
# The first published revision, and phi-1.5's, with GPT-2's names.
ORIGINAL = published("phi-2-original")
SEQUENTIAL = {
    **without(ORIGINAL, "attn_pdrop", "flash_attn", "flash_rotary", "fused_dense", "n_head_kv"),
    "architectures": ["MixFormerSequentialForCausalLM"],
    "architecture": {"block_cls": "parallel", "mixer": {}, "mlp": {"mlp_cls": "mlp"}},
    "embd_layer": "default",
    "model_type": "mixformer-sequential",
    "phyagi_version": "0.0.4.dev",
}
# --- config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        PHI2,
        PHI2_V5,
        ORIGINAL,
        SEQUENTIAL,
        {**PHI2, "hidden_act": "gelu_fast"},  # other names of the same function
        {**PHI2, "hidden_act": "gelu_pytorch_tanh"},
    ],
)
def test_published_config(config):
    translation = translate(FAMILY, config)
    assert translation.findings == ()
    assert translation.fields == FIELDS


def test_absent_keys_are_the_class_defaults():
    optional = ("num_key_value_heads", "layer_norm_eps", "rope_theta", "rope_scaling")
    absent = without(PHI2, *optional, "partial_rotary_factor", "tie_word_embeddings")
    fields = translate(FAMILY, absent).fields
    half = {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_embedding_dim": 40}
    assert fields == {**FIELDS, **half}


@pytest.mark.parametrize(
    "change, rotated",
    [
        ({"rotary_dim": 30}, 30),
        ({"rotary_dim": None}, 32),  # the old class's default
        ({"rotary_dim": 96}, 80),  # which takes no more than a head
        ({"rotary_dim": 64, "partial_rotary_factor": 0.8}, 64),
    ],
)
def test_rotated_dimensions_of_old_configs(change, rotated):
    fields = translate(FAMILY, {**ORIGINAL, **change}).fields
    assert fields["rotary_embedding_dim"] == rotated
    assert int(80 * fields["rotary_pct"]) == rotated  # as readers compute it


def test_the_rope_block_outranks_the_top_level():
    """transformers 5.0 to 5.17 write both; 4 writes rope_theta and knows only the top level."""
    both = {**PHI2_V5, "partial_rotary_factor": 0.5}
    translation = translate(FAMILY, both)
    assert translation.fields == FIELDS
    assert subjects(translation, Severity.NOTE) == {"partial_rotary_factor"}
    assert "rotary_pct" in subjects(translate(FAMILY, {**both, "rope_theta": 1e4}))
    assert translate(FAMILY, {**both, "partial_rotary_factor": 0.4}).findings == ()


def test_every_number_of_rotated_dimensions_survives_the_reader():
    for heads, size in ((1, 80), (1, 64), (1, 98), (1, 122)):
        for rotated in range(2, size + 1, 2):
            small = {"n_embd": heads * size, "n_head": heads, "rotary_dim": rotated}
            fields = translate(FAMILY, {**ORIGINAL, **small}).fields
            assert int(size * fields["rotary_pct"]) == rotated


@pytest.mark.parametrize(
    "change, subject",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1]}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.4125}, "rotary_embedding_dim"),
        ({"partial_rotary_factor": 0.001}, "rotary_embedding_dim"),
        ({"partial_rotary_factor": 1.5}, "rotary_pct"),
        ({"partial_rotary_factor": "0.4"}, "rotary_pct"),
        ({"rotary_dim": 40}, "rotary_pct"),
        ({"rotary_dim": "x"}, "rotary_pct"),
        ({"hidden_size": 2561}, "head_size"),
        ({"rope_parameters": {"rope_theta": 5e4}}, "rope_parameters.rope_theta"),
        ({"embd_layer": "image"}, "embd_layer"),
        ({"architecture": {"block_cls": "sequential"}}, "architecture.block_cls"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
    ],
)
def test_refused(change, subject):
    assert subject in subjects(translate(FAMILY, {**PHI2, **change}))


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-6}, {"new_trick": 3}])
def test_warnings(change):
    translation = translate(FAMILY, {**PHI2, **change})
    assert translation.ok
    assert subjects(translation, Severity.WARNING) == set(change)


# --- weights ---------------------------------------------------------------------------------

LAYERS, HEADS, HIDDEN, INNER, VOCAB = 2, 4, 40, 28, 101


def tiny(directory, dtype="float32", vocab=None, **changes):
    """Write a random model as transformers saves it; return its tensors."""
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {
        **{"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
        **{"partial_rotary_factor": 0.4, "max_position_embeddings": 64},
        **{"bos_token_id": 1, "eos_token_id": 1},
    }
    model = PhiForCausalLM(PhiConfig(**{**sizes, **changes}))
    if vocab:
        model.resize_token_embeddings(vocab)
    model = randomize(model, dtype)
    model.save_pretrained(directory)
    return model.state_dict()


def expected(state, tp):
    """phi-2's rank files by the book: q, k, v cut separately, row-parallel biases whole."""
    ranks = []
    for rank in range(tp):
        tensors = {"transformer.vocab_embedding.weight": state["model.embed_tokens.weight"]}
        for kind in ("weight", "bias"):
            tensors[f"transformer.ln_f.{kind}"] = state[f"model.final_layernorm.{kind}"]
            tensors[f"lm_head.{kind}"] = vocab_share(state[f"lm_head.{kind}"], tp, rank)
        for i in range(LAYERS):
            old, new = f"model.layers.{i}", f"transformer.layers.{i}"
            for kind in ("weight", "bias"):
                norm = state[f"{old}.input_layernorm.{kind}"]
                tensors[f"{new}.input_layernorm.{kind}"] = norm
                qkv = [share(state[f"{old}.self_attn.{p}_proj.{kind}"], tp, rank) for p in "qkv"]
                tensors[f"{new}.attention.qkv.{kind}"] = torch.cat(qkv)
                fc = share(state[f"{old}.mlp.fc1.{kind}"], tp, rank)
                tensors[f"{new}.mlp.fc.{kind}"] = fc
            for old_name, new_name in (
                ("self_attn.dense", "attention.dense"),
                ("mlp.fc2", "mlp.proj"),
            ):
                weight = state[f"{old}.{old_name}.weight"]
                tensors[f"{new}.{new_name}.weight"] = share(weight, tp, rank, dim=1)
                tensors[f"{new}.{new_name}.bias"] = state[f"{old}.{old_name}.bias"]
        ranks.append(tensors)
    return ranks


@pytest.mark.parametrize("tp", [3, 8])  # 8 are more than the heads
def test_sizes_that_cannot_be_divided_are_named(tmp_path, tp):
    tiny(tmp_path / "hf")
    codes, findings = errors(tmp_path / "hf", family="phi2", tp_size=tp)
    linears = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    assert codes == {
        ("sharding", f"transformer.layers.{i}.{name}") for i in range(LAYERS) for name in linears
    }
    assert phireg.plan(tmp_path / "hf", family="phi2", tp_size=tp).tp_sizes == (1, 2, 4)
    assert all(finding.where.startswith("phi2/weights.py:") for finding in findings)


# --- older layouts ---------------------------------------------------------------------------


SMALL = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": VOCAB}
SMALL |= {"n_inner": INNER, "rotary_dim": 4, "n_positions": 64, "torch_dtype": "float32"}


def source_shapes(config):
    """The published tensors' names and shapes."""
    h, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h), "lm_head.bias": (v,)}
    for kind in ("weight", "bias"):
        shapes[f"model.final_layernorm.{kind}"] = (h,)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows, cols in (
            *((f"self_attn.{p}_proj", h, h) for p in ("q", "k", "v")),
            *(("self_attn.dense", h, h), ("mlp.fc1", f, h), ("mlp.fc2", h, f)),
        ):
            shapes |= {f"{layer}.{name}.weight": (rows, cols), f"{layer}.{name}.bias": (rows,)}
        shapes |= {f"{layer}.input_layernorm.{kind}": (h,) for kind in ("weight", "bias")}
    return shapes


class TestMapping(LayoutChecks):
    family, large = "phi2", "phi-2"
    complete, complete_dtype = (("phi-2", PHI2), ("phi-2", PHI2_V5)), "F16"
    complete_size = (5_559_367_680, 10 * 32 + 5)  # the published index's total_size
    source_shapes = staticmethod(source_shapes)

    def write(self, directory, dtype="float32", vocab=None, **changes):
        return tiny(directory, dtype, vocab, **changes)

    def expected(self, state, tp):
        return expected(state, tp)

    def layouts(self, state, config):
        return (
            (fused_per_head(state, LAYERS, HEADS), config),
            (original(state, LAYERS), {**ORIGINAL, **SMALL}),
            (sequential(state, LAYERS), {**SEQUENTIAL, **SMALL}),
        )


def test_published_bytes_per_rank(tmp_path):
    source = write_sparse(tmp_path / "hf", PHI2, source_shapes(PHI2), "F16")
    for tp, size in ((2, 2_780_016_640), (4, 1_390_341_120), (8, 695_503_360)):
        plan = phireg.plan(source, family="phi2", tp_size=tp)
        embedding = 51200 * 2560 * 2  # whole on every rank, where the figures divide it
        for header, file_size in zip(plan.headers, plan.file_sizes, strict=True):
            assert file_size - len(header) == size + embedding - embedding // tp


def test_a_cast_that_overflows_names_the_tensor(tmp_path):
    state = tiny(tmp_path / "hf")
    config = read_config(tmp_path / "hf")
    state["model.layers.1.mlp.fc2.bias"][3] = 1e6
    source = write_source(tmp_path / "large", config, state)
    with pytest.raises(PlanError) as caught:
        convert(source, tmp_path / "out", dtype="float16", tp_size=2)
    assert "model.layers.1.mlp.fc2.bias" in caught.value.message
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", dtype="bfloat16")
    assert_ranks(tmp_path / "out", expected(state, 1), "bfloat16")


class TestConformance(FamilyConformance):
    family = FAMILY
    tp_sizes = (1, 2, 4)
    tiny = without(PHI2, "auto_map") | {
        "hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 101,
        "num_hidden_layers": 3, "intermediate_size": 88, "max_position_embeddings": 128,
        "rope_theta": 5000.0, "bos_token_id": 1, "eos_token_id": 1, "torch_dtype": "float32",
    }  # fmt: skip

    def expected_rows(self, module):
        if not module.endswith("attention.qkv"):
            return None
        layer = module.split(".")[2]
        return [(f"model.layers.{layer}.self_attn.{p}_proj", n) for p in "qkv" for n in range(80)]
