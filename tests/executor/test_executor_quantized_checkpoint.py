"""Which quantized checkpoints the executor takes, and what it says about the others."""

import pytest
import torch
from checkpoints_by_hand import edit_tensors, random_ids, write_checkpoint, written
from helpers.tiny_models import edit_config, phi2

from phireg.errors import CheckError
from phireg.executor import load, read_spec
from phireg.reader.schemes import Quantization


@pytest.fixture(scope="module")
def model():
    return phi2(num_hidden_layers=2)


def problems(directory):
    with pytest.raises(CheckError) as caught:
        load(directory)
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"quant_algo": "W4A16_GPTQ", "group_size": 128}, "quant_algo 'W4A16_GPTQ'"),
        ({"quant_algo": "W4A16_AWQ", "group_size": 64, "pre_quant_scale": True}, "group_size"),
        ({"quant_algo": "W4A16_AWQ", "pre_quant_scale": False}, "pre_quant_scale"),
        ({"quant_algo": "NVFP4", "group_size": 128}, "group_size"),
        ({"quant_algo": ["FP8"]}, "quant_algo"),
        ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo 'NVFP4'"),
        ({"quant_algo": "FP8", "group_size": 64}, "group_size"),
        ({"quant_algo": "W4A16", "has_zero_point": True}, "has_zero_point"),
        ({"quant_algo": "FP8", "sparsity": 2}, "sparsity"),
        ({"quant_algo": "FP8", "exclude_modules": "lm_head"}, "exclude_modules"),
        (
            {"quant_algo": "FP8", "exclude_modules": ["lm_head", "*.1.mlp.*"]},
            "transformer.layers.1.mlp.fc",
        ),
        (
            {"quant_algo": "FP8", "exclude_modules": ["lm_head", "dense"]},
            "transformer.layers.0.attention.dense",
        ),
        ({"quant_algo": "FP8", "exclude_modules": ["transformer.ln_f"]}, "lm_head"),
    ],
)
def test_blocks_without_a_meaning_are_refused(block, said, model, tmp_path):
    edit_config(write_checkpoint(model, tmp_path), quantization=block)
    with pytest.raises(CheckError) as caught:
        load(tmp_path)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"quant_algo": None, "group_size": 64, "sparsity": 2}, Quantization()),
        ({"quant_algo": "FP8"}, Quantization("fp8")),
        (
            {"quant_algo": "W8A8_SQ_PER_CHANNEL", "kv_cache_quant_algo": "INT8"},
            Quantization("int8_sq", "int8"),
        ),
        # what exporters write: module names, the reader's defaults
        (
            {
                "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "group_size": 128,
                "smoothquant_val": 0.5, "clamp_val": None, "has_zero_point": False,
                "pre_quant_scale": False, "use_meta_recipe": False,
                "exclude_modules": [
                    "transformer.layers.0.attention", "transformer.layers.0.input_layernorm",
                    "transformer.ln_f", "lm_head", "transformer.vocab_embedding",
                ],
            },
            Quantization("fp8", "fp8"),
        ),
        ({"quant_algo": "W4A16", "exclude_modules": []}, Quantization("int4_wo")),
        ({"quant_algo": "W8A16", "exclude_modules": ["*lm_head"]}, Quantization("int8_wo")),
        ({"kv_cache_quant_algo": "FP8"}, Quantization(None, "fp8")),
    ],
)  # fmt: skip
def test_blocks_with_a_meaning(block, expected, model, tmp_path):
    edit_config(write_checkpoint(model, tmp_path), quantization=block)
    assert read_spec(tmp_path).quantization == expected


LAYER = "transformer.layers.1"


@pytest.mark.parametrize(
    ("scheme", "kv", "name", "bad", "dtype"),
    [
        ("fp8", None, "mlp.proj.weights_scaling_factor", 0.0, torch.float32),
        ("fp8", None, "attention.qkv.activation_scaling_factor", torch.inf, torch.float32),
        ("int8_sq", None, "attention.dense.weights_scaling_factor", torch.nan, torch.float32),
        ("int8_sq", None, "mlp.fc.activation_scaling_factor", -0.5, torch.float32),
        ("int8_sq", None, "mlp.fc.prequant_scaling_factor", 2.0**-130, torch.float32),
        # a denormal is one of the scale's own dtype
        ("int8_sq", None, "mlp.fc.prequant_scaling_factor", 5e-5, torch.float16),
        (None, "int8", "attention.kv_cache_scaling_factor", 0.0, torch.float32),
    ],
)
def test_bad_scales_are_refused_by_name(scheme, kv, name, bad, dtype, model, tmp_path):
    written(model, tmp_path, random_ids(model, 9), scheme, kv, dtype=dtype)
    edit_tensors(tmp_path, 0, lambda tensors: tensors[f"{LAYER}.{name}"][-1:].fill_(bad))
    (line,) = problems(tmp_path)
    assert line.startswith(f"rank0.safetensors: {LAYER}.{name} ")


def test_every_wrong_tensor_is_named(model, tmp_path):
    written(model, tmp_path, random_ids(model, 9), "int8_sq", "int8", 2)
    wrong = {
        f"{LAYER}.mlp.fc.activation_scaling_factor": lambda t: None,
        f"{LAYER}.attention.kv_cache_scaling_factor": lambda t: None,
        f"{LAYER}.mlp.fc.bias": lambda t: None,
        f"{LAYER}.attention.dense.weights_scaling_factor": lambda t: t[:1].clone(),
        "lm_head.bias": lambda t: t[:-1].clone(),
        f"{LAYER}.attention.qkv.weight": torch.Tensor.float,
        f"{LAYER}.mlp.proj.weights_scaling_factor": torch.Tensor.half,
    }

    def change(tensors):
        for name, spoil in wrong.items():
            tensor = spoil(tensors.pop(name))
            if tensor is not None:
                tensors[name] = tensor
        tensors["lm_head.weights_scaling_factor"] = torch.ones(1)
        tensors["rotary_inv_freq"] = torch.ones(2)  # TensorRT-LLM's own table: no problem

    edit_tensors(tmp_path, 1, change)
    assert {tuple(problem.split()[:2]) for problem in problems(tmp_path)} == {
        ("rank1.safetensors:", name) for name in (*wrong, "lm_head.weights_scaling_factor")
    }


@pytest.mark.parametrize(
    ("scheme", "kv", "name"),
    [
        (None, None, "transformer.ln_f.weight"),
        (None, None, f"{LAYER}.attention.dense.bias"),
        ("fp8", None, f"{LAYER}.attention.qkv.weights_scaling_factor"),
        ("fp8", None, f"{LAYER}.mlp.proj.activation_scaling_factor"),
        ("int8_sq", None, f"{LAYER}.attention.qkv.prequant_scaling_factor"),
        ("int8_sq", None, f"{LAYER}.attention.dense.weights_scaling_factor"),
        ("fp8", "fp8", f"{LAYER}.attention.kv_cache_scaling_factor"),
    ],
)
def test_what_ranks_repeat_must_be_equal(scheme, kv, name, model, tmp_path):
    written(model, tmp_path, random_ids(model, 9), scheme, kv, 2)
    edit_tensors(tmp_path, 1, lambda tensors: tensors[name][-1:].mul_(1.25))
    (line,) = problems(tmp_path)
    assert line.startswith(f"rank1.safetensors: {name} ")


def test_what_ranks_share_out_may_differ(model, tmp_path):
    written(model, tmp_path, random_ids(model, 9), "int8_sq", None, 2)
    for name in ("attention.qkv.weights_scaling_factor", "mlp.proj.prequant_scaling_factor"):
        edit_tensors(tmp_path, 1, lambda tensors, n=name: tensors[f"{LAYER}.{n}"].mul_(1.25))
    load(tmp_path)


def test_weights_rearranged_for_a_gpu_are_refused_with_the_reason(model, tmp_path):
    edit_config(write_checkpoint(model, tmp_path), quantization={"quant_algo": "W8A16"})

    def change(tensors):
        for name in [n for n in tensors if n.endswith(("qkv.weight", "fc.weight"))]:
            out, _ = tensors[name].shape
            tensors[name] = torch.zeros(tensors[name].t().shape, dtype=torch.int8)
            tensors[name.replace("weight", "per_channel_scale")] = torch.ones(out)

    edit_tensors(tmp_path, 0, change)
    (line,) = problems(tmp_path)
    assert "transformer.layers.0.attention.qkv.per_channel_scale" in line


def same_logits(tmp_path, model, change):
    ids = random_ids(model, 1, 9)
    before = load(tmp_path)(ids)
    edit_tensors(tmp_path, 0, change)
    assert torch.equal(load(tmp_path)(ids), before)


def test_older_and_newer_spellings_mean_the_same(model, tmp_path):
    written(model, tmp_path, random_ids(model, 9), "fp8", "int8")

    def as_bytes(tensors):
        for name, tensor in list(tensors.items()):
            if tensor.dtype == torch.float8_e4m3fn:
                tensors[name] = tensor.view(torch.int8)

    def without_dimensions(tensors):
        for name in [n for n in tensors if n.endswith("scaling_factor")]:
            tensors[name] = tensors[name].reshape(())

    def of_keys_and_values(tensors):
        for layer in range(2):
            prefix = f"transformer.layers.{layer}.attention"
            scale = tensors.pop(f"{prefix}.kv_cache_scaling_factor").reshape(1)
            tensors[f"{prefix}.k_cache_scaling_factor"] = scale / 2 if layer else scale
            tensors[f"{prefix}.v_cache_scaling_factor"] = scale if layer else scale / 2

    for change in (as_bytes, without_dimensions, of_keys_and_values):
        same_logits(tmp_path, model, change)

    def keys_alone(tensors):
        del tensors[f"{LAYER}.attention.v_cache_scaling_factor"]

    edit_tensors(tmp_path, 0, keys_alone)
    assert problems(tmp_path) == [
        f"rank0.safetensors: {LAYER}.attention.kv_cache_scaling_factor is missing"
    ]


def test_scales_of_a_cache_that_the_reader_does_not_need_are_left_alone(model, tmp_path):
    """Some exporters write them for every FP8 checkpoint, others beside the one that counts."""
    for scheme, kv, parts in (("fp8", None, ("kv",)), ("int8_sq", "fp8", ("k", "v"))):
        directory = tmp_path / scheme
        written(model, directory, random_ids(model, 9), scheme, kv)
        names = [f"{LAYER}.attention.{part}_cache_scaling_factor" for part in parts]
        further = {name: torch.tensor([7.0]) for name in names}
        same_logits(directory, model, lambda tensors, f=further: tensors.update(f))


def test_quantized_weights_count_as_what_they_are_kept_as(model, tmp_path, monkeypatch):
    """Mapped tensors need no room; dequantized ones do."""
    written(model, tmp_path, random_ids(model, 9), "fp8")
    parameters = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("phireg.executor.model.free_memory", lambda: parameters * 4)
    assert load(tmp_path).offload
    monkeypatch.setattr("phireg.executor.model.free_memory", lambda: parameters * 8)
    assert not load(tmp_path).offload
