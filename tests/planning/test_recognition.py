"""Weights of another kind are one line with one thing to do; wrappers' names are accepted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.command_line import run_phireg
from helpers.plan_sources import MODELS, write
from safetensors.torch import load_file, save_file

import phireg
from phireg.errors import SourceError
from phireg.findings import Severity

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(params=["mini", "small", "phi2"])
def each(request, tmp_path):
    return made(request.param, tmp_path)


@pytest.fixture
def model(tmp_path):
    return made("medium", tmp_path)


def made(kind, tmp_path):
    _, config, shapes = MODELS[kind]
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    return write(tmp_path / "model", config, tensors)


def rewrite(directory, change, **config):
    """Change the tensors by a function of their dict, and keys of config.json."""
    path = directory / "model.safetensors"
    tensors = {name: x.contiguous() for name, x in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | config))


def refusal(directory, **options) -> SourceError:
    with pytest.raises(SourceError) as caught:
        phireg.plan(directory, **options)
    assert caught.value.hint
    assert len(str(caught.value).splitlines()) <= 4
    return caught.value


# --- quantized weights ------------------------------------------------------------------------


def linears(pack):
    """Replace the weight of every linear of the layers by what ``pack`` makes of it."""

    def change(tensors):
        result = {}
        for name, x in tensors.items():
            if "proj" in name and name.endswith(".weight"):
                stem = name.removesuffix("weight")
                result |= {f"{stem}{leaf}": y for leaf, y in pack(*x.shape).items()}
            else:
                result[name] = x
        return result

    return change


def zeros(dtype):
    return lambda *shape: torch.zeros(shape).to(getattr(torch, dtype))


U8, I8, I32, U32, F16, E4M3 = map(
    zeros, ("uint8", "int8", "int32", "uint32", "float16", "float8_e4m3fn")
)
MAKERS = {
    "bitsandbytes": lambda r, c: {
        "weight": U8(r * c // 2, 1), "weight.absmax": U8(r), "weight.quant_map": F16(16),
        "weight.quant_state.bitsandbytes__nf4": U8(100),
    },
    "8 bits": lambda r, c: {"weight": I8(r, c), "SCB": F16(r), "weight_format": U8(1)},
    "MLX": lambda r, c: {"weight": U32(r, c // 4), "scales": F16(r, 2), "biases": F16(r, 2)},
    "GPTQ": lambda r, c: {
        "qweight": I32(c // 4, r), "qzeros": I32(1, r), "scales": F16(1, r), "g_idx": I32(c),
    },
    "AWQ": lambda r, c: {"qweight": I32(c, r // 4), "qzeros": I32(1, r), "scales": F16(1, r)},
    "HQQ": lambda r, c: {"W_q": U8(r, c), "scale": F16(r), "zero": F16(r), "nbits": I8(1)},
    "ModelOpt": lambda r, c: {
        "weight": E4M3(r, c), "weight_scale": F16(1), "input_scale": F16(1),
    },
    "NVFP4": lambda r, c: {
        "weight": U8(r, c // 2), "weight_scale": E4M3(r, 1), "weight_scale_2": F16(1),
        "input_scale": F16(1),
    },
    "compressed-tensors": lambda r, c: {
        "weight_packed": I32(r, c // 4), "weight_scale": F16(r, 1), "weight_shape": I32(2),
    },
    "FP8": lambda r, c: {"weight": E4M3(r, c), "weight_scale_inv": F16(1, 1)},
    "weights are F8_E4M3": lambda r, c: {"weight": E4M3(r, c)},
    "weights are I8": lambda r, c: {"weight": I8(r, c)},
}  # fmt: skip


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "other"}}])
def test_quantized_weights_are_named_whatever_the_config_says(model, maker, config):
    rewrite(model, linears(MAKERS[maker]), **config)
    error = refusal(model)
    assert maker in error.message
    assert "already quantized" in error.message


@pytest.mark.parametrize(
    ("method", "maker", "pack"),
    [
        ("compressed-tensors", "compressed-tensors",
         lambda r, c: {"weight": E4M3(r, c), "weight_scale": F16(r, 1)}),
        ("auto-round", "AutoRound", MAKERS["AWQ"]),
        ("gptq", "GPTQ", MAKERS["AWQ"]),
    ],
)  # fmt: skip
def test_the_config_decides_between_makers_of_the_same_names(model, method, maker, pack):
    rewrite(model, linears(pack), quantization_config={"quant_method": method})
    assert maker in refusal(model).message


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_a_leftover_block_is_a_note_and_changes_nothing(each, key):
    before = phireg.plan(each)
    rewrite(each, lambda x: x, **{key: {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    plan = phireg.plan(each)
    assert not plan.errors
    assert (plan.config, plan.outputs) == (before.config, before.outputs)
    (note,) = [f for f in plan.findings if f not in before.findings]
    assert (note.severity, note.subject) == (Severity.NOTE, key)


@pytest.mark.parametrize(
    ("file", "side", "maker"),
    [
        ("gptq_model-4bit-128g.safetensors", "quantize_config.json", "GPTQ"),
        ("awq_model_w4.safetensors", "quant_config.json", "AWQ"),
        ("weights.safetensors", "hf_quant_config.json", "ModelOpt"),
    ],
)
def test_side_files_tell_weights_of_unknown_names(model, file, side, maker):
    (model / "model.safetensors").rename(model / file)
    (model / side).write_text("{}")
    assert maker in refusal(model).message


# --- other kinds of weights -------------------------------------------------------------------


def test_lora_layers_inside(model):
    def change(tensors):
        result = {
            name.replace("qkv_proj.", "qkv_proj.base_layer."): x for name, x in tensors.items()
        }
        return result | {"model.layers.0.self_attn.qkv_proj.lora_A.default.weight": F16(4, 24)}

    rewrite(model, change)
    error = refusal(model)
    assert "LoRA" in error.message and "merge_and_unload" in error.hint


def test_placeholders_of_zero_3(each):
    rewrite(each, lambda tensors: {name: x[:0].flatten() for name, x in tensors.items()})
    error = refusal(each)
    assert "ZeRO-3" in error.message and "zero_to_fp32" in error.hint


def test_one_empty_tensor_is_left_to_the_plan(model):
    rewrite(model, lambda tensors: tensors | {"extra.weight": torch.zeros(0)})
    assert {(e.code, e.subject) for e in phireg.plan(model).errors} == {
        ("unmapped", "extra.weight")
    }


def test_experts_that_the_config_does_not_know(model):
    experts = {f"model.layers.0.mlp.experts.{i}.w1.weight": F16(4, 4) for i in range(3)}
    rewrite(model, lambda tensors: tensors | experts)
    assert "experts" in refusal(model).message


def test_two_kinds_are_told_together(model):
    rewrite(model, linears(lambda r, c: {"W_q": I8(r, c), "lora_A.weight": F16(1, c)}))
    with pytest.raises(SourceError) as caught:
        phireg.plan(model)
    assert all(word in caught.value.message for word in ("LoRA", "already quantized"))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
@pytest.mark.parametrize("family", ["auto", "phi3-medium"])
def test_llamafied_models_have_a_way_out(model, architecture, family):
    rewrite(model, lambda x: x, architectures=[architecture], model_type="llama")
    with pytest.raises(SourceError) as caught:
        phireg.plan(model, family=family)
    assert "Phi3ForCausalLM" in caught.value.hint and "--family" not in caught.value.hint


# --- wrappers' names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "base_model.model.", "language_model.", "_fsdp_wrapped_module.",
     "module._orig_mod.", "model.language_model."],
)  # fmt: skip
def test_a_prefix_of_all_names_is_a_note(each, prefix):
    before = phireg.plan(each)
    rewrite(each, lambda tensors: {f"{prefix}{name}": x for name, x in tensors.items()})
    plan = phireg.plan(each)
    assert not plan.errors
    assert plan.source.tensors.keys() == before.source.tensors.keys()
    assert {f.code for f in plan.findings if f not in before.findings} == {"names"}
    digests = []
    for number, kind in enumerate((each, made_again(each))):
        out = each.parent / f"out{number}"
        phireg.convert(phireg.plan(kind), out)
        digests.append(json.loads((out / "phireg.json").read_text())["files"]["rank0.safetensors"])
    assert digests[0] == digests[1]


def made_again(directory):
    """The same model without wrappers' names."""
    other = directory.parent / "plain"
    config = json.loads((directory / "config.json").read_text())
    kind = next(k for k, (_, c, _) in MODELS.items() if c == config)
    made(kind, other)
    return other / "model"


def test_wrappers_inside_of_names(model):
    rewrite(
        model,
        lambda tensors: {
            name.replace(".mlp.", "._checkpoint_wrapped_module.mlp._orig_mod."): x
            for name, x in tensors.items()
        },
    )
    assert not phireg.plan(model).errors


def test_names_without_model(model):
    rewrite(model, lambda tensors: {name.removeprefix("model."): x for name, x in tensors.items()})
    assert not phireg.plan(model).errors


def test_a_prefix_of_some_names_is_an_error_with_advice(model):
    rewrite(
        model,
        lambda tensors: {
            f"module.{name}" if "layers.1." in name else name: x for name, x in tensors.items()
        },
    )
    assert "names" in {error.code for error in phireg.plan(model).errors}


def test_names_that_would_collide_are_left_alone(model):
    rewrite(model, lambda tensors: tensors | {f"_orig_mod.{NAME}.weight": F16(24, 20)})
    (error,) = phireg.plan(model).errors
    assert (error.code, error.subject) == ("unmapped", f"_orig_mod.{NAME}.weight")


# --- directories ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "kind", "advice"),
    [
        (["zero_to_fp32.py", "latest", "global_step500/"], "ZeRO", "zero_to_fp32"),
        (["pytorch_model_fsdp_0/"], "FSDP", "merge-weights"),
        (["pytorch_model_fsdp.bin"], "FSDP", "merge-weights"),
        (["__0_0.distcp", "__1_0.distcp", ".metadata"], "FSDP", "merge-weights"),
        (["checkpoint-500/", "checkpoint-1000/"], "trainer", "checkpoint-N"),
        (["hf_model_0001_0.pt", "recipe_state.pt"], "torchtune", "Hugging Face"),
        (["onnx/"], "ONNX", "original"),
        (["cpu_and_mobile/", "cuda/"], "ONNX", "original"),
        (["gguf/"], "GGUF", "original"),
        (["model-q4.gguf"], "GGUF", "original"),
    ],
)
def test_state_directories_are_named(tmp_path, entries, kind, advice):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["mini"][1]))
    for entry in entries:
        if entry.endswith("/"):
            (tmp_path / entry).mkdir()
        else:
            (tmp_path / entry).write_bytes(b"x")
    error = refusal(tmp_path)
    assert kind in error.message and advice in error.hint
    result = run_phireg("convert", "--model-dir", tmp_path, "--output-dir", tmp_path / "out")
    assert result.exit_code == 3


@pytest.mark.parametrize("folder", ["checkpoint-1000", "best"])
def test_a_model_inside_is_named(model, tmp_path, folder):
    inside = tmp_path / "run" / folder
    inside.parent.mkdir()
    model.rename(inside)
    (tmp_path / "run" / "checkpoint-500").mkdir()
    assert str(inside) in str(refusal(inside.parent))


def test_an_adapter_among_a_trainers_checkpoints(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["mini"][1]))
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in refusal(tmp_path).message


@pytest.mark.parametrize(
    "name", ("hf_quant_config.json", "quantize_config.json", "adapter_config.json")
)
def test_a_leftover_file_is_a_note_and_changes_nothing(each, name):
    before = phireg.plan(each)
    (each / name).write_text("{}")
    plan = phireg.plan(each)
    assert plan.outputs == before.outputs
    notes = [finding for finding in plan.findings if finding.severity is Severity.NOTE]
    assert name in [finding.subject for finding in notes]
