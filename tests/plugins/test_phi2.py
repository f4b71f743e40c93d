"""phi-2: its config table and its mapping, against hand-written expectations."""

import json

import pytest
import torch
from family_checks import (
    CASTS,
    as_transformers5,
    assert_ranks,
    assert_stands_alone,
    convert,
    errors,
    randomize,
    rank_files,
    reported,
    share,
    translate,
    vocab_share,
    without,
    write_source,
    write_sparse,
)
from phireg_plugins.phi2 import FAMILY
from safetensors.torch import load_file

import phireg
from phireg.errors import PlanError
from phireg.findings import Severity
from phireg.testing import FamilyConformance

PHI2 = {
    "_name_or_path": "microsoft/phi-2",
    "architectures": ["PhiForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_phi.PhiConfig",
        "AutoModelForCausalLM": "modeling_phi.PhiForCausalLM",
    },
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "vocab_size": 51200,
}
PHI2_V5 = {
    **as_transformers5(PHI2, rope_theta=10000.0, rope_type="default", partial_rotary_factor=0.4),
    "pad_token_id": None,
    "transformers_version": "5.23.0",
}
# The first published revision, and phi-1.5's, in GPT-2's spelling.
ORIGINAL = {
    "activation_function": "gelu_new",
    "architectures": ["PhiForCausalLM"],
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "flash_attn": False,
    "flash_rotary": False,
    "fused_dense": False,
    "img_processor": None,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "phi-msft",
    "n_embd": 2560,
    "n_head": 32,
    "n_head_kv": None,
    "n_inner": None,
    "n_layer": 32,
    "n_positions": 2048,
    "resid_pdrop": 0.1,
    "rotary_dim": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.35.2",
    "vocab_size": 51200,
}
SEQUENTIAL = {
    **without(ORIGINAL, "attn_pdrop", "flash_attn", "flash_rotary", "fused_dense", "n_head_kv"),
    "architectures": ["MixFormerSequentialForCausalLM"],
    "architecture": {"block_cls": "parallel", "mixer": {}, "mlp": {"mlp_cls": "mlp"}},
    "embd_layer": "default",
    "model_type": "mixformer-sequential",
    "phyagi_version": "0.0.4.dev",
}
EXPECTED = {
    "architecture": "PhiForCausalLM",
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_size": 80,
    "vocab_size": 51200,
    "intermediate_size": 10240,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu_new",
    "norm_epsilon": 1e-05,
    "position_embedding_type": "rope_gpt_neox",
    "rotary_base": 10000.0,
    "rotary_pct": 0.4,
    "partial_rotary_factor": 0.4,
    "rotary_embedding_dim": 32,
    "rotary_scaling": None,
    "tie_word_embeddings": False,
    "logits_dtype": "float32",
    "qk_layernorm": False,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "share_embedding_table": False,
}
# What TensorRT-LLM's phi model reads without a usable default, 0.12 to 1.3.0rc20.
REQUIRED = {
    *("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "intermediate_size", "max_position_embeddings", "hidden_act"),
    *("position_embedding_type", "rotary_base", "rotary_pct", "rotary_scaling", "mapping"),
}
EXAMPLE = {
    **{"architecture": "PhiForCausalLM", "dtype": "float16", "logits_dtype": "float32"},
    **{"vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    **{"head_size": 80, "hidden_act": "gelu_new", "norm_epsilon": 1e-05},
    **{"max_position_embeddings": 2048, "position_embedding_type": "rope_gpt_neox"},
    **{"rotary_base": 10000.0, "rotary_scaling": None, "rotary_pct": 0.4},
    **{"rotary_embedding_dim": 32, "qk_layernorm": False},
    **{"use_parallel_embedding": False, "embedding_sharding_dim": 0},
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
}


def test_imports_nothing_but_itself():
    assert_stands_alone("phi2", PHI2)


# --- config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [PHI2, PHI2_V5, ORIGINAL, SEQUENTIAL], ids=["v4", "v5", "original", "sequential"]
)
def test_published_config(config):
    translation = translate(FAMILY, config)
    assert translation.findings == ()
    assert translation.fields == EXPECTED


def test_absent_keys_are_the_class_defaults():
    optional = ("num_key_value_heads", "layer_norm_eps", "rope_theta", "rope_scaling")
    absent = without(PHI2, *optional, "partial_rotary_factor", "tie_word_embeddings")
    fields = translate(FAMILY, absent).fields
    half = {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_embedding_dim": 40}
    assert fields == {**EXPECTED, **half}


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


def test_every_number_of_rotated_dimensions_survives_the_reader():
    for heads, size in ((1, 80), (1, 64), (1, 98), (1, 122)):
        for rotated in range(2, size + 1, 2):
            small = {"n_embd": heads * size, "n_head": heads, "rotary_dim": rotated}
            fields = translate(FAMILY, {**ORIGINAL, **small}).fields
            assert int(size * fields["rotary_pct"]) == rotated


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_pytorch_tanh"])
def test_other_names_of_tanh_gelu(name):
    assert translate(FAMILY, {**PHI2, "hidden_act": name}).fields["hidden_act"] == "gelu_new"


@pytest.mark.parametrize(
    "change, subject, says",
    [
        ({"hidden_act": "gelu"}, "hidden_act", "gelu_new"),
        ({"hidden_act": "relu"}, "hidden_act", "gelu_new"),
        ({"qk_layernorm": True}, "qk_layernorm", "no q/k norms"),
        ({"num_key_value_heads": 8}, "num_key_value_heads", "no grouped KV heads"),
        ({"num_key_value_heads": 5}, "num_key_value_heads", "cannot share"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", "'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling", "'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling", "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling", "'llama3'"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "rope_scaling",
            "'longrope'",
        ),
        ({"partial_rotary_factor": 0.4125}, "rotary_embedding_dim", "33 of"),
        ({"partial_rotary_factor": 0.001}, "rotary_embedding_dim", "0 of"),
        ({"partial_rotary_factor": 1.5}, "rotary_pct", "at most 1"),
        ({"partial_rotary_factor": "0.4"}, "rotary_pct", "expected a number"),
        ({"partial_rotary_factor": True}, "rotary_pct", "expected a number"),
        ({"rotary_dim": 40}, "rotary_pct", "partial_rotary_factor: 32, rotary_dim: 40"),
        ({"rotary_dim": "x"}, "rotary_pct", "whole number"),
        ({"hidden_size": 2561}, "head_size", "cannot be divided"),
        ({"rope_parameters": {"rope_theta": 5e4}}, "rope_parameters.rope_theta", "10000.0"),
        ({"embd_layer": "image"}, "embd_layer", "plain embedding"),
        ({"architecture": {"block_cls": "sequential"}}, "architecture.block_cls", "parallel"),
        ({"vocab_size": None}, "vocab_size", "missing"),
        ({"vocab_size": 0}, "vocab_size", "from 1"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps", "above zero"),
    ],
)
def test_refused(change, subject, says):
    translation = translate(FAMILY, {**PHI2, **change})
    assert not translation.ok
    assert says in reported(translation)[subject]


def test_all_problems_at_once():
    several = {"hidden_act": "gelu", "qk_layernorm": True, "hidden_size": "x"}
    assert {"hidden_act", "qk_layernorm", "hidden_size"} == set(
        reported(translate(FAMILY, {**PHI2, **several}))
    )


def test_another_epsilon_is_a_warning():
    translation = translate(FAMILY, {**PHI2, "layer_norm_eps": 1e-6})
    assert translation.ok and translation.fields["norm_epsilon"] == 1e-6
    assert "1e-05" in reported(translation, Severity.WARNING)["layer_norm_eps"]


def test_an_unknown_key_is_a_warning():
    translation = translate(FAMILY, {**PHI2, "new_trick": 3})
    assert translation.ok
    assert set(reported(translation, Severity.WARNING)) == {"new_trick"}


# --- weights ---------------------------------------------------------------------------------

LAYERS, HEADS, HIDDEN, INNER, VOCAB = 2, 4, 40, 28, 101


def tiny(directory, dtype="float32", seed=0, resize=None, shard="5GB", **changes):
    """A random model as transformers saves it, and its tensors."""
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(
        PhiConfig(
            **{
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "partial_rotary_factor": 0.4,
                "max_position_embeddings": 64,
                "bos_token_id": 1,
                "eos_token_id": 1,
                **changes,
            }
        )
    )
    if resize:
        model.resize_token_embeddings(resize)
    model = randomize(model, dtype, seed)
    model.save_pretrained(directory, max_shard_size=shard)
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


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("source_dtype, dtype, result", CASTS)
def test_rank_files(tmp_path, source_dtype, dtype, result, tp):
    state = tiny(tmp_path / "hf", source_dtype)
    plan = convert(tmp_path / "hf", tmp_path / "out", family="phi2", dtype=dtype, tp_size=tp)
    assert plan.findings == ()
    assert_ranks(tmp_path / "out", expected(state, tp), result)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == result
    assert written["mapping"] == {"world_size": tp, "tp_size": tp, "pp_size": 1}


@pytest.mark.parametrize("vocab", [97, 128, 131])
def test_resized_vocabulary(tmp_path, vocab):
    state = tiny(tmp_path / "hf", resize=vocab)
    assert state["lm_head.bias"].shape == (vocab,)
    convert(tmp_path / "hf", tmp_path / "out", family="phi2", dtype="float32", tp_size=4)
    assert_ranks(tmp_path / "out", expected(state, 4), "float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["vocab_size"] == vocab  # not padded: readers pad it themselves


def test_sizes_that_cannot_be_divided_are_named(tmp_path):
    tiny(tmp_path / "hf")
    found, findings = errors(tmp_path / "hf", family="phi2", tp_size=3)
    assert {code for code, _ in found} == {"sharding"}
    subjects = {subject.split(".", 3)[-1] for _, subject in found}
    assert {"attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"} == subjects
    assert all("tp sizes that work: 1, 2, 4" in finding.detail for finding in findings)
    assert all(finding.where.startswith("phi2/weights.py:") for finding in findings)


def test_more_ranks_than_heads_are_refused(tmp_path):
    tiny(tmp_path / "hf", intermediate_size=32)
    found, _ = errors(tmp_path / "hf", family="phi2", tp_size=8)
    assert ("sharding", "transformer.layers.0.attention.qkv") in found


# --- older layouts ---------------------------------------------------------------------------


def fused_per_head(state):
    """transformers 4.36: [q_i; k_i; v_i] for every head i."""
    state = dict(state)
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            heads = [
                state.pop(f"model.layers.{i}.self_attn.{p}_proj.{kind}").unflatten(0, (HEADS, -1))
                for p in "qkv"
            ]
            fused = torch.stack(heads, dim=1).flatten(0, 2)
            state[f"model.layers.{i}.self_attn.query_key_value.{kind}"] = fused
    return state


def older(state, prefix, first, embedding, norm, head):
    """The layouts before transformers: [Q; K; V] in Wqkv, shorter names."""
    state = dict(state)
    new = {f"{embedding}.weight": state.pop("model.embed_tokens.weight")}
    for kind in ("weight", "bias"):
        new[f"{norm}.{kind}"] = state.pop(f"model.final_layernorm.{kind}")
        new[f"{head}.{kind}"] = state.pop(f"lm_head.{kind}")
        for i in range(LAYERS):
            old, layer = f"model.layers.{i}", f"{prefix}.{i + first}"
            qkv = [state.pop(f"{old}.self_attn.{p}_proj.{kind}") for p in "qkv"]
            new[f"{layer}.mixer.Wqkv.{kind}"] = torch.cat(qkv)
            new[f"{layer}.mixer.out_proj.{kind}"] = state.pop(f"{old}.self_attn.dense.{kind}")
            new[f"{layer}.ln.{kind}"] = state.pop(f"{old}.input_layernorm.{kind}")
            for fc in ("mlp.fc1", "mlp.fc2"):
                new[f"{layer}.{fc}.{kind}"] = state.pop(f"{old}.{fc}.{kind}")
    assert not state
    return new


def original(state):
    return older(state, "transformer.h", 0, "transformer.embd.wte", "lm_head.ln", "lm_head.linear")


def sequential(state):
    last = f"layers.{LAYERS + 1}"
    return older(state, "layers", 1, "layers.0.wte", f"{last}.ln", f"{last}.linear")


SMALL = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": VOCAB}
SMALL |= {"n_inner": INNER, "rotary_dim": 4, "n_positions": 64, "torch_dtype": "float32"}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "rearrange, config",
    [
        (fused_per_head, None),
        (original, {**ORIGINAL, **SMALL}),
        (sequential, {**SEQUENTIAL, **SMALL}),
    ],
    ids=["fused-per-head", "original", "sequential"],
)
def test_older_layouts_give_the_same_bytes(tmp_path, rearrange, config, tp):
    state = tiny(tmp_path / "hf")
    config = config or json.loads((tmp_path / "hf" / "config.json").read_text())
    write_source(tmp_path / "old", config, rearrange(state))
    convert(tmp_path / "hf", tmp_path / "out", family="phi2", tp_size=tp)
    convert(tmp_path / "old", tmp_path / "out-old", family="phi2", tp_size=tp)
    assert rank_files(tmp_path / "out") == rank_files(tmp_path / "out-old")
    assert_ranks(tmp_path / "out-old", expected(state, tp), "float16")
    same = [json.loads((tmp_path / o / "config.json").read_text()) for o in ("out", "out-old")]
    assert same[0] == same[1]


@pytest.mark.parametrize("rearrange", [fused_per_head, original, sequential])
def test_two_layouts_at_once_are_refused(tmp_path, rearrange):
    state = tiny(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    extra = {name: t for name, t in rearrange(state).items() if name not in state}
    both = write_source(tmp_path / "both", config, {**state, **extra})
    found, _ = errors(both, family="phi2")
    assert found == {("unmapped", name) for name in extra}


def test_rotary_buffers_are_dropped_with_a_note(tmp_path):
    state = tiny(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    source = write_source(tmp_path / "buffers", config, {**state, **buffers})
    plan = convert(source, tmp_path / "out", family="phi2")
    notes = {f.subject for f in plan.findings if f.severity is Severity.NOTE}
    assert notes == set(buffers)
    assert_ranks(tmp_path / "out", expected(state, 1), "float16")


# --- tied heads ------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("stated", [True, None])
@pytest.mark.parametrize("rearranged", [False, True])
def test_tied_head_keeps_its_own_bias(tmp_path, tp, stated, rearranged):
    state = tiny(tmp_path / "hf", tie_word_embeddings=True)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in saved and "lm_head.bias" in saved
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    tensors = saved
    if rearranged:
        tensors = without(original(state), "lm_head.linear.weight")
        config = {**ORIGINAL, **SMALL, "tie_word_embeddings": True}
    if stated is None:
        del config["tie_word_embeddings"]
    source = write_source(tmp_path / "tied", config, tensors)
    convert(source, tmp_path / "out", family="phi2", dtype="float32", tp_size=tp)
    assert_ranks(tmp_path / "out", expected(state, tp), "float32")


def test_a_head_of_a_tied_model_is_dropped_with_a_note(tmp_path):
    state = tiny(tmp_path / "hf", tie_word_embeddings=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    other = {**state, "lm_head.weight": torch.full_like(state["lm_head.weight"], 7.0)}
    plan = convert(
        write_source(tmp_path / "both", config, other), tmp_path / "out", dtype="float32"
    )
    (note,) = plan.findings
    assert (note.severity, note.code, note.subject) == (Severity.NOTE, "dropped", "lm_head.weight")
    assert_ranks(tmp_path / "out", expected(state, 1), "float32")


# --- forms of the source, of the output ------------------------------------------------------


def test_other_files_same_bytes(tmp_path):
    state = tiny(tmp_path / "hf")
    tiny(tmp_path / "sharded", shard="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    for name in ("hf", "sharded", "bin"):
        convert(tmp_path / name, tmp_path / f"out-{name}", family="phi2", tp_size=2)
    assert rank_files(tmp_path / "out-hf") == rank_files(tmp_path / "out-sharded")
    assert rank_files(tmp_path / "out-hf") == rank_files(tmp_path / "out-bin")


@pytest.mark.parametrize("precision, algorithm", [("int8", "W8A16"), ("int4", "W4A16")])
def test_weight_only_leaves_the_weights_raw(tmp_path, precision, algorithm):
    tiny(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", family="phi2", tp_size=2)
    convert(
        tmp_path / "hf", tmp_path / "quantized", family="phi2", tp_size=2, weight_only=precision
    )
    assert rank_files(tmp_path / "out") == rank_files(tmp_path / "quantized")
    plain, quantized = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "quantized")
    )
    # A list given to the reader replaces its own, so it must name the embedding as well.
    assert quantized.pop("quantization") == {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", "*vocab_embedding"],
    }
    plain.pop("quantization")
    assert plain == quantized


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


@pytest.mark.parametrize("config", [PHI2, PHI2_V5], ids=["v4", "v5"])
def test_complete_example(tmp_path, config):
    source = write_sparse(tmp_path / "hf", config, source_shapes(config), "F16")
    plan = phireg.plan(source, family="phi2")
    assert plan.findings == ()
    assert plan.bytes_in == 5_559_367_680  # the published index's total_size
    assert {key: plan.config.get(key, "absent") for key in EXAMPLE} == EXAMPLE
    assert set(plan.config) >= REQUIRED
    assert len({output.name for output in plan.outputs}) == 10 * 32 + 5


def test_published_bytes_per_rank(tmp_path):
    source = write_sparse(tmp_path / "hf", PHI2, source_shapes(PHI2), "F16")
    for tp, size in ((2, 2_780_016_640), (4, 1_390_341_120), (8, 695_503_360)):
        plan = phireg.plan(source, family="phi2", tp_size=tp)
        embedding = 51200 * 2560 * 2  # whole on every rank, where the figures divide it
        for header, file_size in zip(plan.headers, plan.file_sizes, strict=True):
            assert file_size - len(header) == size + embedding - embedding // tp


def test_a_cast_that_overflows_names_the_tensor(tmp_path):
    state = tiny(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    state["model.layers.1.mlp.fc2.bias"][3] = 1e6
    source = write_source(tmp_path / "large", config, state)
    with pytest.raises(PlanError, match=r"model\.layers\.1\.mlp\.fc2\.bias: 1 value"):
        convert(source, tmp_path / "out", dtype="float16", tp_size=2)
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
