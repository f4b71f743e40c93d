"""A checkpoint of any number of ranks becomes the directory that its values say it is."""

import json
import re
import shutil

import pytest
import torch
from helpers import by_hand, exports, tiny_models
from helpers.command_line import run_phireg
from safetensors.torch import load_file, save_file

import phireg
from phireg import demo, registry
from phireg.calibration.collect import collect
from phireg.errors import CheckError, SourceError, UsageError
from phireg.reference.load import open_reference

CPU = torch.device("cpu")


def tensors(directory):
    held = {}
    for file in sorted(directory.glob("*.safetensors")):
        held |= load_file(file)
    return held


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        bits = (x.reshape(-1).view(torch.uint8) for x in (tensor, right[name]))
        assert torch.equal(*bits), name


@pytest.mark.parametrize("name", tiny_models.MODELS)
@pytest.mark.parametrize("tp_size", [1, 4])
def test_an_unquantized_checkpoint_gives_the_source_back(tmp_path, name, tp_size):
    """The ranks cut, pad, repeat and reorder; the source is what transformers saved."""
    source, checkpoint = tmp_path / "model", tmp_path / "ckpt"
    tiny_models.write(name, source, torch.bfloat16)
    phireg.convert(phireg.plan(source, tp_size=tp_size), checkpoint)
    weights = tensors(source)
    for file in source.glob("model*"):
        file.unlink()  # none are needed
    phireg.migrate(checkpoint, source, tmp_path / "out", max_shard_size=50_000)
    same(tensors(tmp_path / "out"), weights)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()


def quantized(tmp_path, key, qformat, tp_size, **options):
    source = by_hand.write_model(tmp_path / "model", key, by_hand.model(key))
    common = {"qformat": qformat, "kv_cache_dtype": "fp8", "dtype": "float16"}
    plan = phireg.plan(source, tp_size=tp_size, **common)
    phireg.quantize(plan, tmp_path / "ckpt", by_hand.calibration(key), **options)
    plan = phireg.plan(source, target="hf-modelopt", **common)
    phireg.quantize(plan, tmp_path / "direct", by_hand.calibration(key), **options)
    return source


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
@pytest.mark.parametrize(("key", "tp_size"), [("small", 2), ("mini", 1)])
def test_quantized_values_and_scales_are_carried_over(tmp_path, key, tp_size, qformat):
    """Where both layouts quantize the same modules, migrating is as good as quantizing."""
    source = quantized(tmp_path, key, qformat, tp_size)
    phireg.migrate(tmp_path / "ckpt", source, tmp_path / "out")
    direct, migrated = tensors(tmp_path / "direct"), tensors(tmp_path / "out")
    caches = {
        name: direct.pop(name) for name in list(direct) if name.endswith(("k_scale", "v_scale"))
    }
    joint = {name: migrated.pop(name) for name in caches}
    same(migrated, direct)
    # A TensorRT-LLM cache has one scale for both, at least 1.
    for name, scale in joint.items():
        attention = name.rpartition(".")[0].rpartition(".")[0]
        apart = (caches[f"{attention}.{part}_proj.{part}_scale"] for part in "kv")
        assert scale == max(1.0, *apart), name
    for file in ("config.json", "hf_quant_config.json"):
        expected, actual = (
            json.loads((tmp_path / d / file).read_text()) for d in ("direct", "out")
        )
        assert actual == expected


def test_a_scale_that_ranks_share_is_that_of_each_projection(tmp_path):
    """TensorRT-LLM has one scale for q, k and v of phi-2, ModelOpt's layout one for each."""
    source = quantized(tmp_path, "phi2", "fp8", 2)
    phireg.migrate(tmp_path / "ckpt", source, tmp_path / "out")
    ranks = [load_file(tmp_path / "ckpt" / f"rank{rank}.safetensors") for rank in range(2)]
    out, layer = tensors(tmp_path / "out"), "transformer.layers.0.attention.qkv"
    scale = ranks[0][f"{layer}.weights_scaling_factor"].item()
    cut = [rank[f"{layer}.weight"].view(torch.uint8).chunk(3) for rank in ranks]
    for number, part in enumerate("qkv"):
        module = f"model.layers.0.self_attn.{part}_proj"
        assert out[f"{module}.weight_scale"].item() == scale
        joined = torch.cat([parts[number] for parts in cut])
        assert torch.equal(out[f"{module}.weight"].view(torch.uint8), joined)


def test_what_is_refused(tmp_path):
    source, checkpoint = tmp_path / "model", tmp_path / "ckpt"
    tiny_models.write("phi3-gqa", source, torch.bfloat16)
    phireg.convert(phireg.plan(source, tp_size=2), checkpoint)
    with pytest.raises(UsageError):
        phireg.migrate(checkpoint, source, tmp_path / "out", target="trtllm")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tiny_models.edit_config(other, num_key_value_heads=4)
    with pytest.raises(CheckError):
        phireg.migrate(checkpoint, other, tmp_path / "out", target="hf")
    rank = load_file(checkpoint / "rank1.safetensors")
    norm = rank["transformer.layers.1.input_layernorm.weight"]
    norm[3] += 1
    save_file(rank, checkpoint / "rank1.safetensors")
    (checkpoint / "phireg.json").unlink()
    with pytest.raises(SourceError) as caught:
        phireg.migrate(checkpoint, source, tmp_path / "out", target="hf")
    assert "layers.1.input_layernorm" in str(caught.value)
    del rank["transformer.layers.0.mlp.proj.weight"]
    save_file(rank, checkpoint / "rank1.safetensors")
    with pytest.raises(CheckError) as caught:
        phireg.migrate(checkpoint, source, tmp_path / "out", target="hf")
    assert "layers.0.mlp.proj.weight" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("qformat", ["fp8", "nvfp4"])
def test_scales_that_would_be_rounded_are_refused(tmp_path, qformat):
    """compressed-tensors has them in the model's dtype, or their reciprocals."""
    source = exports.source("phi3", tmp_path / "model")
    reference = open_reference(
        registry.load("phi3-mini").family, source, weights=None, dtype=torch.bfloat16, device=CPU
    )
    statistics = collect(reference, [row.tolist() for row in exports.rows()], device=CPU)
    plan = phireg.plan(source, family="phi3-mini", qformat=qformat)
    phireg.quantize(plan, tmp_path / "ckpt", statistics)
    with pytest.raises(UsageError):
        phireg.migrate(tmp_path / "ckpt", source, tmp_path / "out", target="hf-compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_a_mixture_on_several_ranks(tmp_path):
    """Ranks share experts out and repeat the router, which stays float32 there."""
    source = demo.find("phi3.5-moe").directory
    phireg.convert(phireg.plan(source, tp_size=4, moe_ep_size=2), tmp_path / "ckpt")
    phireg.migrate(tmp_path / "ckpt", source, tmp_path / "out", target="hf")
    same(tensors(tmp_path / "out"), tensors(source))


def test_a_weight_only_checkpoint_becomes_unquantized(tmp_path):
    source = tiny_models.write("phi3-gqa", tmp_path / "model", torch.bfloat16)
    phireg.quantize(phireg.plan(source, qformat="int4_wo"), tmp_path / "ckpt")
    phireg.migrate(tmp_path / "ckpt", source, tmp_path / "out")
    same(tensors(tmp_path / "out"), tensors(source))


def test_a_rank_of_another_checkpoint_is_found(tmp_path):
    """Nothing but the manifest tells that a rank has another's rows."""
    source, checkpoint = tmp_path / "model", tmp_path / "ckpt"
    tiny_models.write("phi3-gqa", source, torch.bfloat16)
    phireg.convert(phireg.plan(source, tp_size=2), checkpoint)
    shutil.copy(checkpoint / "rank0.safetensors", checkpoint / "rank1.safetensors")
    with pytest.raises(CheckError) as caught:
        phireg.migrate(checkpoint, source, tmp_path / "out", target="hf")
    assert "rank1.safetensors" in str(caught.value)


def test_the_command(tmp_path):
    source = quantized(tmp_path, "mini", "int8_sq", 2)
    command = (
        "migrate",
        tmp_path / "ckpt",
        "--model-dir",
        source,
        "--output-dir",
        tmp_path / "out",
    )
    done = run_phireg(*command, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert "model.safetensors" in document["files"] and document["target"] == "hf-modelopt"
    assert run_phireg(*command).exit_code == 6
    assert "phireg run" not in run_phireg(*command, "--overwrite").output
    (source / "tokenizer.json").write_text("{}")
    assert "phireg run" in run_phireg(*command, "--overwrite").output  # it has what prompts need
    refused = run_phireg("migrate", tmp_path / "out", "--model-dir", source, "--output-dir", "x")
    assert refused.exit_code == 3
    proposed = re.search(r"phireg (verify \S+ --model-dir) MODEL", refused.output)[1].split()
    assert run_phireg(*proposed, source, "--quick").exit_code == 0
    config = tmp_path / "ckpt" / "config.json"
    config.write_text(config.read_text().replace('"FP8"', '"INT8"'))  # the cache's
    refused = run_phireg(*command, "--overwrite")
    assert refused.exit_code == 2 and "int8 KV cache" in refused.output
