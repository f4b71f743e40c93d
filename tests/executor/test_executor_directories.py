"""The executor on Hugging Face directories, beside the packages that wrote them.

Logits are those of ModelOpt's and compressed-tensors' own fake-quantized models, in float32 so that
a rounding seldom turns.
"""

import json

import pytest
import torch
from helpers import exports, tiny_models
from safetensors.torch import load_file, save_file

import phireg
from phireg.errors import CheckError
from phireg.executor import load, read_meaning

pytestmark = [
    pytest.mark.skipif(tiny_models.FOUR, reason="the exporters need a newer transformers"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {n: exports.source(n, root / n, dtype=torch.float32) for n in exports.MAKERS}


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def logits(directory):
    return load(directory)(exports.rows()[:1])[0]


def far(directory, expected):
    """What another reading of the files would be off by: that of no quantization at all."""
    return relative(logits(directory), expected)


@pytest.mark.parametrize("family", sorted(tiny_models.MODELS))
def test_plain_directories_compute_what_transformers_does(family, tmp_path):
    directory = tiny_models.write(family, tmp_path / "source", shard="60KB")
    assert (directory / "model.safetensors.index.json").exists()
    reference = tiny_models.opened(family, directory)
    reference.keep_all()
    ids = torch.randint(1, 100, (1, 50), generator=torch.Generator().manual_seed(0))
    assert relative(load(directory)(ids), reference.logits(ids)) < 1e-4


@pytest.mark.parametrize("qformat", sorted(set(exports.MODELOPT) - {"nvfp4"}))
def test_modelopt(qformat, sources, tmp_path):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is missing")
    expected = exports.modelopt("phi3", sources["phi3"], qformat, tmp_path / "q")
    assert far(sources["phi3"], expected) > 0.1
    assert relative(logits(tmp_path / "q"), expected) < 0.02
    assert read_meaning(tmp_path / "q").quantization.kv_cache == "fp8"


@pytest.mark.slow
@pytest.mark.parametrize("qformat", ["fp8", "fp8_pc_pt", "int8_sq", "int8_wo"])
def test_modelopt_on_separate_projections(qformat, sources, tmp_path):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is missing")
    expected = exports.modelopt("phi2", sources["phi2"], qformat, tmp_path / "q")
    assert far(sources["phi2"], expected) > 0.05
    assert relative(logits(tmp_path / "q"), expected) < 0.02


def test_modelopt_folds_into_norms_and_packs_pairs_of_rows(sources, tmp_path):
    """Its export of phi-2 is another rounding than the model before, so weights are compared."""
    mtq = pytest.importorskip("modelopt.torch.quantization.qtensor", reason="no nvidia-modelopt")
    for family, qformat in (("phi2", "int4_awq"), ("phi3", "nvfp4")):
        out = tmp_path / family
        exports.modelopt(family, sources[family], qformat, out, run=qformat != "nvfp4")
        stored, weights = load_file(out / "model.safetensors"), load(out).layer_weights(1)[0]
        own = {"phi2": "mlp.fc2", "phi3": "self_attn.o_proj"}[family]
        ours = weights[{"phi2": "mlp.proj", "phi3": "attention.dense"}[family] + ".weight"]
        name = f"model.layers.1.{own}"
        weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        if qformat == "nvfp4":
            tensor = mtq.NVFP4QTensor(torch.Size(ours.shape), torch.float32, weight)
            second = stored[f"{name}.weight_scale_2"]
            theirs = tensor.dequantize(scale=scale, double_scale=second, block_sizes={-1: 16})
        else:
            theirs = torch.zeros(2 * len(weight), weight.shape[1])
            for row, line in enumerate(weight.tolist()):
                for column, byte in enumerate(line):
                    for half, level in enumerate((byte % 16, byte // 16)):
                        signed = level - 16 if level > 7 else level
                        factor = scale[2 * row + half, column // 128]
                        theirs[2 * row + half, column] = signed * factor
        assert torch.allclose(ours, theirs.reshape(ours.shape), rtol=1e-6, atol=0), family


@pytest.mark.parametrize("scheme", sorted(exports.COMPRESSED))
def test_compressed_tensors(scheme, sources, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is missing")
    expected = exports.compressed("phi3", sources["phi3"], scheme, tmp_path / "q")
    assert far(sources["phi3"], expected) > 0.03
    # Its own dynamic int8 divides by 127.5, where vLLM's kernels and the executor divide by 127.
    assert relative(logits(tmp_path / "q"), expected) < (0.1 if scheme == "w8a8" else 1e-3)


def test_dynamic_int8_by_hand():
    from phireg.executor.quantized import linear

    x = torch.tensor([[0.5, -2.54, 1.0], [127.0, 0.49, -0.51]])
    weights = {"l.weight": torch.eye(3), "l.inputs_int8_token": torch.empty(0)}
    expected = torch.tensor([[0.5, -2.54, 1.0], [127.0, 0.0, -1.0]])
    assert torch.allclose(linear(weights, "l", x, None), expected, atol=1e-6)


def test_projections_that_round_inputs_differently_stay_apart(sources, tmp_path):
    """One of q, k and v left alone, and one with a scale of its own, as other tools may write."""
    pytest.importorskip("modelopt", reason="nvidia-modelopt is missing")
    exports.modelopt("phi2", sources["phi2"], "fp8", tmp_path / "q", cache=False, run=False)
    path = tmp_path / "q" / "model.safetensors"
    tensors, source = load_file(path), load_file(sources["phi2"] / "model.safetensors")
    for layer in range(3):
        q, k = (f"model.layers.{layer}.self_attn.{part}_proj" for part in "qk")
        del tensors[f"{q}.weight_scale"], tensors[f"{q}.input_scale"]
        tensors[f"{q}.weight"] = source[f"{q}.weight"]
        tensors[f"{k}.input_scale"] *= 2
    save_file(tensors, path)
    exclude(tmp_path / "q", "*.q_proj")
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    model = load(tmp_path / "q")
    from phireg.executor.quantized import linear

    actual = linear(model.layer_weights(0)[0], "attention.qkv", x, None)
    expected = [x @ tensors["model.layers.0.self_attn.q_proj.weight"].T]
    for part in "kv":
        name = f"model.layers.0.self_attn.{part}_proj"
        scale = tensors[f"{name}.input_scale"]
        rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        weight = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        expected.append(rounded @ weight.T)
    assert torch.allclose(actual, torch.cat(expected, -1), atol=1e-5)
    assert torch.isfinite(model(exports.rows()[:1])).all()


def exclude(directory, pattern):
    for name, keys in (("config.json", ("quantization_config", "ignore")),
                       ("hf_quant_config.json", ("quantization", "exclude_modules"))):  # fmt: skip
        document = json.loads((directory / name).read_text())
        document[keys[0]][keys[1]].append(pattern)
        (directory / name).write_text(json.dumps(document))


def test_a_sliding_window_binds_as_in_transformers(tmp_path):
    model = exports.phi3(sliding_window=9)
    model.save_pretrained(tmp_path)
    ids = exports.rows()[:1]
    with torch.no_grad():
        expected = model(ids).logits
    assert relative(load(tmp_path)(ids), expected) < 1e-4
    text = phireg.executor.generate(load(tmp_path), [ids[0].tolist()], 6)[0]
    with torch.no_grad():
        greedy = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert text == greedy[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("file", "keys", "value", "names"),
    [
        ("config.json", ("quantization_config", "quant_algo"), "NVFP4", "quant_algo"),
        ("config.json", ("quantization_config", "ignore"), [], "excluded"),
        ("hf_quant_config.json", ("quantization", "kv_cache_quant_algo"), None, "KV cache"),
        ("hf_quant_config.json", ("quantization", "quant_algo"), "FP6", "FP6"),
        ("config.json", ("hidden_act",), "relu", "hidden_act"),
        ("config.json", ("num_key_value_heads",), 3, "heads"),
        ("config.json", ("architectures",), ["MistralForCausalLM"], "architectures"),
    ],
)
def test_what_has_no_meaning_is_refused(file, keys, value, names, sources, tmp_path):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is missing")
    exports.modelopt("phi3", sources["phi3"], "fp8", tmp_path / "q", run=False)
    path = tmp_path / "q" / file
    document = json.loads(path.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(CheckError, match=names):
        load(tmp_path / "q")
    assert phireg.inspect(tmp_path / "q").problems


def test_tensors_that_do_not_belong_are_named(sources, tmp_path):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is missing")
    exports.modelopt("phi3", sources["phi3"], "fp8", tmp_path / "q", run=False)
    path = tmp_path / "q" / "model.safetensors"
    tensors = load_file(path)
    qkv, down = "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"
    tensors[f"{qkv}.k_bias"] = torch.zeros(1)
    del tensors[f"{down}.input_scale"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, path)
    problems = " ".join(phireg.inspect(tmp_path / "q").problems)
    for name in (f"{qkv}.k_bias", f"{down}.input_scale", "model.norm.weight"):
        assert name in problems
    with pytest.raises(CheckError, match=r"down_proj\.input_scale"):
        load(tmp_path / "q")


def test_an_index_that_disagrees_with_its_shards_is_refused(sources, tmp_path):
    directory = exports.source("phi3", tmp_path / "s", shard="300KB")
    first = sorted(directory.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(CheckError, match=first.name):
        load(directory)


def test_experts_are_read_each_by_its_own_modules(tmp_path):
    """Beside the same model with the weights that the integers stand for."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    plain, stored = (tmp_path / name for name in ("plain", "q"))
    long = {"rope_type": "longrope", "rope_theta": 5000.0, "short_mscale": 1.1, "long_mscale": 1.3,
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64}  # fmt: skip
    model = PhimoeForCausalLM(PhimoeConfig(
        vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, num_local_experts=3, pad_token_id=0,
        max_position_embeddings=128, attention_bias=True, lm_head_bias=True, rope_parameters=long,
        router_jitter_noise=0.1,
    ))  # fmt: skip
    tiny_models.randomize(model, 2).save_pretrained(plain)
    config = json.loads((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    quantized = dict(tensors)
    for name in tensors:
        if name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            module, weight = name.removesuffix(".weight"), tensors[name].float()
            scale = weight.abs().amax(1) / 127
            levels = (weight / scale[:, None]).round()
            quantized |= {name: levels.to(torch.int8), f"{module}.weight_scale": scale}
            tensors[name] = (levels * scale[:, None]).to(tensors[name].dtype)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    stored.mkdir()
    save_file(quantized, stored / "model.safetensors", {"format": "pt"})
    block = {"quant_method": "modelopt", "quant_algo": "W8A16", "ignore": ["lm_head"]}
    (stored / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    ids = torch.arange(1, 40)[None]
    assert torch.equal(load(stored)(ids), load(plain)(ids))
    result = phireg.verify(stored, plain, checks=("structure", "config", "weights"))
    assert result.passed, result.checks
    first = "model.layers.1.block_sparse_moe.experts.1"
    for part in ("weight", "weight_scale"):
        gate, up = (f"{first}.{which}.{part}" for which in ("w1", "w3"))
        quantized[gate], quantized[up] = quantized[up], quantized[gate]
    save_file(quantized, stored / "model.safetensors", {"format": "pt"})
    result = phireg.verify(stored, plain, checks=("weights",))
    (problem,) = result.check("weights").problems
    assert (first in problem.where, "exchanged" in problem.text) == (True, True)
