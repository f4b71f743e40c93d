"""LoRA adapters merged while reading, judged by PEFT and by sums computed here."""

from __future__ import annotations

import json
import math

import numpy as np
import peft
import pytest
import torch
import transformers
from helpers.command_line import run_phireg
from helpers.memory import measure
from helpers.plan_sources import HEADS, HIDDEN, INNER, MODELS, PHI2, SIZE, VOCAB, write
from helpers.source_shapes import phi3_shapes
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import phireg
from phireg.checkpoint.rankfiles import RankFiles
from phireg.source import adapter

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EVERY = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def phi3(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    values = {
        "vocab_size": 48, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    config = transformers.Phi3Config(**(values | settings))
    return transformers.Phi3ForCausalLM(config).to(dtype)


def phi2():
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=48, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, partial_rotary_factor=0.7,
    )  # fmt: skip
    return transformers.PhiForCausalLM(config)


def trained(model, directory, **settings):
    """Save a model and a LoRA with random parameters; return what PEFT makes of the two files."""
    model.save_pretrained(directory)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    base = type(model).from_pretrained(directory, dtype=model.dtype)  # without the adapter
    adapted.save_pretrained(directory)
    return peft.PeftModel.from_pretrained(base, directory).merge_and_unload().state_dict()


def values(source):
    """Every tensor of a source as it is read, in float32; read in odd pieces."""
    read = {}
    with source.open() as reader:
        for name, tensor in source.tensors.items():
            data = bytearray(tensor.nbytes)
            for start in range(0, tensor.nbytes, 37):
                reader.read_into(tensor, start, memoryview(data)[start : start + 37])
            kind = getattr(torch, {"F32": "float32", "BF16": "bfloat16"}[tensor.dtype])
            read[name] = torch.frombuffer(data, dtype=kind).view(tensor.shape).float()
    return read


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (phi3, {"r": 3, "lora_alpha": 7, "target_modules": EVERY}),
        (phi3, {"r": 4, "use_rslora": True, "target_modules": EVERY}),
        (phi3, {"target_modules": "all-linear", "fan_in_fan_out": True}),
        (phi3, {"r": 2, "target_modules": ["o_proj", "embed_tokens", "lm_head"]}),
        (phi3, {"target_modules": ["qkv_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        (
            phi3,
            {
                "r": 2,
                "target_modules": EVERY,
                "rank_pattern": {r"layers\.1\.mlp\.down_proj": 5, "o_proj": 3},
                "alpha_pattern": {"^model.layers.0.self_attn.qkv_proj": 3, ".*proj": 11},
            },
        ),
        (phi2, {"target_modules": ["q_proj", "v_proj", "dense", "fc1"], "bias": "all"}),
        (phi2, {"target_modules": ["q_proj", "fc2"], "bias": "lora_only"}),
    ],
    ids=["alpha", "rslora", "fan", "ends", "saved", "patterns", "bias", "lora-bias"],
)
def test_the_same_values_as_peft(make, settings, tmp_path):
    expected = trained(make(), tmp_path, **settings)
    plan = phireg.plan(tmp_path, adapter="merge", dtype="float32")
    assert not plan.errors
    merged, plain = values(plan.source), values(phireg.plan(tmp_path, adapter="ignore").source)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(merged[name], plain[name]) for name in plain)


def test_bfloat16_is_rounded_once(tmp_path):
    expected = trained(phi3(torch.bfloat16), tmp_path, target_modules=EVERY, r=3)
    merged = values(phireg.plan(tmp_path, adapter="merge").source)
    for name, value in expected.items():
        # PEFT rounds the product too, so the last place may differ.
        torch.testing.assert_close(merged[name], value.float(), rtol=2**-7, atol=2**-8)


def test_a_conversion_writes_and_verify_reads_the_merged_weights(tmp_path):
    expected = trained(phi3(), tmp_path / "model", target_modules=EVERY)
    model, out = tmp_path / "model", tmp_path / "out"
    refused = run_phireg("convert", "--model-dir", model, "--output-dir", out)
    assert refused.exit_code == 3
    assert all(choice in refused.output for choice in ("--adapter merge", "--adapter ignore"))
    asked = ("--model-dir", model, "--dtype", "float32", "--tp-size", 2, "--adapter", "merge")
    assert run_phireg("convert", *asked, "--output-dir", out).exit_code == 0
    with RankFiles(out, 2) as files:
        dense = [
            np.frombuffer(files[rank].read("transformer.layers.1.attention.dense.weight"), "f4")
            for rank in range(2)
        ]
    halves = [half.reshape(24, 12) for half in dense]
    both = torch.from_numpy(np.concatenate(halves, axis=1))
    torch.testing.assert_close(
        both, expected["model.layers.1.self_attn.o_proj.weight"], rtol=1e-5, atol=1e-6
    )
    assert run_phireg("verify", out, "--model-dir", model, "--quick").exit_code == 0
    other = run_phireg("verify", out, "--model-dir", model, "--quick", "--adapter", "ignore")
    assert other.exit_code == 4
    fp8 = ("quantize", "--qformat", "int8_wo", *asked, "--output-dir", tmp_path / "int8")
    assert run_phireg(*fp8, "--no-measure").exit_code == 0


# --- adapters of another layout than the weights' ---------------------------------------------


def by_hand(directory, layers, rank=2, alpha=6, **config):
    """Write an adapter with random factors; return rank, and the product of each module."""
    random = np.random.default_rng(1)
    tensors, products = {}, {}
    for module, (rows, columns) in layers.items():
        down = random.normal(size=(rank, columns)).astype("f4")
        up = random.normal(size=(rows, rank)).astype("f4")
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        products[module] = up.astype("f8") @ down * (alpha / rank)
    save_file(tensors, directory / ADAPTER)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha} | config
    (directory / CONFIG).write_text(json.dumps(content))
    return products


def floats(shapes):
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}


def merged(directory):
    plan = phireg.plan(directory, adapter="merge", dtype="float32")
    assert not plan.errors
    return {name: value.numpy() for name, value in values(plan.source).items()}


def test_separate_layers_over_fused_weights(tmp_path):
    _, config, shapes = MODELS["medium"]
    tensors = floats(shapes)
    directory = write(tmp_path / "model", config, tensors)
    attention, mlp = "model.layers.1.self_attn", "model.layers.0.mlp"
    kv = 2 * SIZE
    products = by_hand(
        directory,
        {f"{attention}.k_proj": (kv, HIDDEN), f"{attention}.v_proj": (kv, HIDDEN),
         f"{mlp}.up_proj": (INNER, HIDDEN)},
    )  # fmt: skip
    result = merged(directory)
    q = HEADS * SIZE
    fused = tensors[f"{attention}.qkv_proj.weight"].astype("f8")
    fused[q : q + kv] += products[f"{attention}.k_proj"]
    fused[q + kv :] += products[f"{attention}.v_proj"]
    gate_up = tensors[f"{mlp}.gate_up_proj.weight"].astype("f8")
    gate_up[INNER:] += products[f"{mlp}.up_proj"]
    np.testing.assert_allclose(result[f"{attention}.qkv_proj.weight"], fused, rtol=1e-6)
    np.testing.assert_allclose(result[f"{mlp}.gate_up_proj.weight"], gate_up, rtol=1e-6)
    untouched = "model.layers.0.self_attn.qkv_proj.weight"
    assert np.array_equal(result[untouched], tensors[untouched])


def test_fused_layers_over_separate_weights(tmp_path):
    _, config, shapes = MODELS["mini"]
    tensors = floats(shapes)
    for i in range(config["num_hidden_layers"]):
        fused = tensors.pop(f"model.layers.{i}.self_attn.qkv_proj.weight")
        for name, part in zip("qkv", np.split(fused, 3), strict=True):
            tensors[f"model.layers.{i}.self_attn.{name}_proj.weight"] = np.ascontiguousarray(part)
    directory = write(tmp_path / "model", config, tensors)
    attention = "model.layers.2.self_attn"
    product = by_hand(directory, {f"{attention}.qkv_proj": (3 * HIDDEN, HIDDEN)})
    result = merged(directory)
    for name, part in zip("qkv", np.split(product[f"{attention}.qkv_proj"], 3), strict=True):
        weight = f"{attention}.{name}_proj.weight"
        np.testing.assert_allclose(result[weight], tensors[weight] + part, rtol=1e-6)


def test_separate_layers_over_rows_that_are_stored_head_by_head(tmp_path):
    """The first transformers port of phi-2 has [q; k; v] for each head."""
    _, _, shapes = MODELS["phi2"]
    tensors = floats(shapes)
    for i in range(PHI2["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            attention = f"model.layers.{i}.self_attn"
            parts = [tensors.pop(f"{attention}.{p}_proj.{kind}") for p in "qkv"]
            heads = [part.reshape(HEADS, SIZE, *part.shape[1:]) for part in parts]
            fused = np.stack(heads, axis=1).reshape(3 * HIDDEN, *parts[0].shape[1:])
            tensors[f"{attention}.query_key_value.{kind}"] = fused
    directory = write(tmp_path / "model", PHI2, tensors)
    module = "model.layers.0.self_attn.v_proj"
    product = by_hand(directory, {module: (HIDDEN, HIDDEN)})[module]
    name = "model.layers.0.self_attn.query_key_value.weight"
    expected = tensors[name].astype("f8").reshape(HEADS, 3, SIZE, HIDDEN)
    expected[:, 2] += product.reshape(HEADS, SIZE, HIDDEN)
    np.testing.assert_allclose(
        merged(directory)[name], expected.reshape(3 * HIDDEN, HIDDEN), rtol=1e-6
    )


# --- what is refused, by name -----------------------------------------------------------------

QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture
def model(tmp_path):
    """A Phi-3 with a good adapter beside it."""
    _, config, shapes = MODELS["mini"]
    directory = write(tmp_path / "model", config, floats(shapes))
    by_hand(directory, {QKV: (3 * HIDDEN, HIDDEN)})
    return directory


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True}, {"peft_type": "LOHA"}, {"peft_type": "IA3"}, {"lora_bias": True},
        {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
        {"trainable_token_indices": [1]}, {"target_parameters": ["x"]}, {"use_bdlora": {"a": 1}},
        {"layer_replication": [[0, 1]]}, {"a_method_of_next_year": True}, {"r": 3}, {"r": "2"},
        {"r": None}, {"r": 2**70}, {"lora_alpha": "6"},
        {"lora_alpha": 1e300}, {"rank_pattern": [1]}, {"rank_pattern": {"qkv_proj": 5}},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"qkv_proj": None}},
    ],
    ids=str,
)  # fmt: skip
def test_refused_by_config(model, change):
    content = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(content | change))
    errors = phireg.plan(model, adapter="merge").errors
    assert errors
    assert {error.code for error in errors} == {"adapter"}
    (key,) = change
    told = " ".join(f"{error.subject} {error.detail}" for error in errors)
    named = {"peft_type": change[key], "r": "r", "lora_alpha": "alpha", "rank_pattern": "ran"}
    named |= {"alpha_pattern": "alpha"}
    assert named.get(key, key) in told
    assert not phireg.plan(model, adapter="ignore").errors


def test_patterns_that_would_match_for_years(model, monkeypatch):
    monkeypatch.setitem(adapter._PATTERN_LIMITS, "seconds", 0.3)
    content = json.loads((model / CONFIG).read_text())
    for pattern in (r"(\S+)+!", "(.|.?)" * 40 + "!"):
        (model / CONFIG).write_text(json.dumps(content | {"alpha_pattern": {pattern: 1}}))
        (error,) = phireg.plan(model, adapter="merge").errors
        assert error.code == "adapter"
        assert "alpha_pattern" in error.detail


def test_factors_of_a_weight_that_is_a_number(model):
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {f"{QKV}.weight": np.ones((), "f4")}, model / "model.safetensors")
    factors = load_file(model / ADAPTER)
    for name, value in factors.items():
        factors[name] = value[:, :0] if "lora_A" in name else value
    save_file(factors, model / ADAPTER)
    errors = phireg.plan(model, adapter="merge").errors
    assert (("adapter", f"{QKV}.weight")) in {(error.code, error.subject) for error in errors}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{QKV}.lora_magnitude_vector", (3 * HIDDEN,)),
        (f"{QKV}.lora_B.bias", (3 * HIDDEN,)),
        (f"{QKV}.lora_A.weight", None),
        (f"{QKV}.lora_A.weight", (2, HIDDEN + 1)),
        (f"{QKV}.lora_B.weight", (3 * HIDDEN + 1, 2)),
        (f"{QKV}.lora_B.weight", (3 * HIDDEN, 3)),
        (f"{QKV}.weight", (3 * HIDDEN, HIDDEN)),
        ("model.layers.9.self_attn.qkv_proj.lora_A.weight", (2, HIDDEN)),
        ("model.vision.lora_A.weight", (2, HIDDEN)),
        ("score.weight", (2, HIDDEN)),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", (1, HIDDEN)),
        ("lm_head.weight", (VOCAB + 1, HIDDEN)),
    ],
)
def test_refused_by_tensors(model, name, shape):
    tensors = load_file(model / ADAPTER)
    key = f"base_model.model.{name}"
    tensors.pop(key, None)
    if shape is not None:
        tensors[key] = np.ones(shape, "f4")
    if name.endswith(("9.self_attn.qkv_proj.lora_A.weight", "vision.lora_A.weight")):
        tensors[key.replace("lora_A", "lora_B")] = np.ones((3 * HIDDEN, 2), "f4")
    save_file(tensors, model / ADAPTER)
    errors = phireg.plan(model, adapter="merge").errors
    module = name.partition(".lora_")[0].removesuffix(".weight")
    assert any(module in f"{error.subject} {error.detail}" for error in errors)


def test_a_missing_head_that_nothing_ties_is_missing_whatever_an_adapter_changes(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors")
    table = {"base_model.model.model.embed_tokens.weight": np.ones((VOCAB, HIDDEN), "f4")}
    save_file(load_file(model / ADAPTER) | table, model / ADAPTER)
    codes = [
        [e.code for e in phireg.plan(model, adapter="merge", tie=t).errors] for t in (False, True)
    ]
    assert codes == [["missing"], ["adapter"]]


def test_an_adapter_whose_config_is_missing(model):
    (model / CONFIG).unlink()
    assert {error.subject for error in phireg.plan(model, adapter="merge").errors} == {ADAPTER}
    assert not phireg.plan(model, adapter="ignore").errors


def test_an_adapter_that_is_not_there(model):
    (model / ADAPTER).unlink()
    assert [error.code for error in phireg.plan(model, adapter="merge").errors] == ["reading"]
    assert not phireg.plan(model).errors


def test_a_sum_that_does_not_fit_is_told_before_anything_appears(tmp_path):
    _, config, shapes = MODELS["mini"]
    tensors = {name: value.astype("f2") for name, value in floats(shapes).items()}
    directory = write(tmp_path / "model", config | {"torch_dtype": "float16"}, tensors)
    by_hand(directory, {QKV: (3 * HIDDEN, HIDDEN)}, alpha=1e6)
    result = run_phireg(
        *("convert", "--model-dir", directory, "--output-dir", tmp_path / "out"),
        *("--adapter", "merge"),
    )
    assert result.exit_code == 3
    assert QKV in result.output
    assert not (tmp_path / "out").exists()


def test_scale_of_rank_stabilized_lora(model):
    """PEFT divides alpha by the root of the rank."""
    content = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(content | {"use_rslora": True}))
    (delta,) = phireg.plan(model, adapter="merge").source.tensors[f"{QKV}.weight"].deltas
    assert delta.scale == pytest.approx(6 / math.sqrt(2))


def test_explain_names_the_layers(model):
    shown = run_phireg("explain", model, "transformer.layers.0.attention.qkv", "--adapter", "merge")
    assert shown.exit_code == 0
    assert f"rank 2 in {ADAPTER}" in shown.output and f"0:{3 * HIDDEN}" in shown.output


CONVERT = """
import json, sys
import torch
import phireg

source = Path(sys.argv[1])
torch.set_num_threads(1)
(torch.ones(512, 64).double() @ torch.ones(64, 512).double()).to(torch.bfloat16)
plan = phireg.plan(source, adapter="merge")
before = resident("VmRSS")
phireg.convert(plan, source.parent / "out")
print(json.dumps([plan.bytes_in, before, resident("VmHWM"), plan.buffer_bytes(2)]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    hidden, inner, layers = 3072, 8192, 1
    config = MODELS["mini"][1] | {
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 32,
        "vocab_size": 8000, "num_hidden_layers": layers, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes = phi3_shapes(config)
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    weights = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_torch(weights, directory / "model.safetensors")
    factors = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes.items() if "_proj" in n):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{stem}.lora_A.weight"] = torch.ones(64, columns, dtype=torch.bfloat16)
        factors[f"{stem}.lora_B.weight"] = torch.ones(rows, 64, dtype=torch.bfloat16)
    save_torch(factors, directory / ADAPTER)
    (directory / CONFIG).write_text(json.dumps({"r": 64, "lora_alpha": 1}))
    size, before, peak, promised = measure(CONVERT, directory)
    assert size > 300_000_000
    assert promised < 80_000_000
    assert peak - before < promised + 24_000_000  # threads, their stacks, allocator slack
