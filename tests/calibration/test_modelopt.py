"""Every scale and weight beside nvidia-modelopt's own export of the same model and token ids.

Both calibrate in the model's dtype with the same attention (SDPA, transformers' default): another
kernel, or another dtype, moves maxima by a rounding step, which SmoothQuant's vectors show.
"""

import copy
import json

import pytest
import torch
from helpers import tiny_models as sources
from helpers.tiny_models import from_pretrained, opened
from safetensors.torch import load_file

import phireg
from phireg.calibration.collect import collect
from phireg.dtypes import E4M3_MAX

if sources.FOUR:
    pytest.skip("nvidia-modelopt needs a newer transformers", allow_module_level=True)
mtq = pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is missing")

MODELS = ("phi2", "phi3-tied", "phi3-gqa")
DTYPES = (torch.bfloat16, torch.float16)
LINEARS = {
    "attention.dense": ("self_attn.dense", "self_attn.o_proj"),
    "mlp.fc": ("mlp.fc1", "mlp.gate_up_proj"),
    "mlp.proj": ("mlp.fc2", "mlp.down_proj"),
    "attention.qkv": [f"self_attn.{part}_proj" for part in ("qkv", "q", "k", "v")],
}  # fmt: skip
FORMATS = {"fp8": "FP8_DEFAULT_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG"}


def rows():
    """One of them beyond the original context of long rope, two of one length."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 100, (n,), generator=generator).tolist() for n in (40, 12, 17, 40)]


def forward(model):
    for row in rows():
        model(torch.tensor([row]))


def exported(name, directory, dtype, qformat, out):
    """Tensors of ModelOpt's unified checkpoint with an FP8 KV cache."""
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    model = from_pretrained(name, directory, dtype)

    config = copy.deepcopy(getattr(mtq, FORMATS[qformat]))
    config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    with torch.no_grad():
        export_hf_checkpoint(mtq.quantize(model, config, forward), export_dir=out)
    return load_file(out / "model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_scale_and_weight_is_modelopts(tmp_path, name, dtype):
    directory = sources.write(name, tmp_path / "source", dtype)
    statistics = collect(opened(name, directory, dtype), rows(), device=torch.device("cpu"))
    source = load_file(directory / "model.safetensors")
    for qformat in FORMATS:
        theirs = exported(name, directory, dtype, qformat, tmp_path / f"modelopt-{qformat}")
        options = {
            "family": sources.MODELS[name][1],
            "qformat": qformat,
            "dtype": str(dtype).removeprefix("torch."),
        }
        plan = phireg.plan(directory, **options)
        phireg.quantize(plan, tmp_path / qformat, statistics)
        ours = load_file(tmp_path / qformat / "rank0.safetensors")
        plan = phireg.plan(directory, target="hf-modelopt", kv_cache_dtype="fp8", **options)
        phireg.quantize(plan, tmp_path / f"hf-{qformat}", statistics)
        compare_directories(tmp_path / f"hf-{qformat}", tmp_path / f"modelopt-{qformat}", source)
        compared = 0
        for layer in range(3):
            for what, maxima in (("k", statistics.keys), ("v", statistics.values)):
                scale = theirs[f"model.layers.{layer}.self_attn.{what}_proj.{what}_scale"]
                assert scale == torch.tensor(maxima[layer]) / E4M3_MAX, (layer, what)
            for target, candidates in LINEARS.items():
                paths = [f"model.layers.{layer}.{path}" for path in candidates]
                paths = [path for path in paths if f"{path}.weight" in theirs]
                compared += len(paths)
                linear = f"transformer.layers.{layer}.{target}"
                compare = compare_fp8 if qformat == "fp8" else compare_int8
                compare(linear, paths, ours, theirs, source)
        assert compared == 3 * (6 if name == "phi2" else 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "dtype"), list(zip(sources.GROUPED, DTYPES * 2, strict=False)))
def test_awqs_factors_are_modelopts(tmp_path, name, dtype):
    """Exponent for exponent, and whatever the batches are."""
    directory = sources.write(name, tmp_path / "source", dtype)
    found = [
        collect(
            opened(name, directory, dtype),
            rows(),
            device=torch.device("cpu"),
            batch_size=size,
            search=True,
        )
        for size in (1, 2)
    ]
    model = from_pretrained(name, directory, dtype)
    quantized = mtq.quantize(model, copy.deepcopy(mtq.INT4_AWQ_CFG), forward)
    compared = set()
    for module, linear in quantized.named_modules():
        if getattr(linear, "input_quantizer", None) is None or ".layers." not in module:
            continue
        if linear.input_quantizer.pre_quant_scale is not None:
            compared.add(module)
            for statistics in found:
                factor = torch.from_numpy(statistics.awq[module]).to(dtype)
                assert torch.equal(factor, linear.input_quantizer.pre_quant_scale), module
    assert compared == found[0].awq.keys()
    assert len(compared) == 3 * (6 if name.startswith("phi2") else 4)
    assert len({x for module in compared for x in found[0].awq[module].tolist()}) > 300


def compare_directories(ours, theirs, source):
    """The same tensors, byte for byte, and the same settings but for the producer.

    Only FP8 weights of one scale differ where ModelOpt rounds them twice, in 16 bits and to e4m3:
    theirs are its division repeated here, ours are rounded once and no further from the source.
    """
    own, expected = (load_file(directory / "model.safetensors") for directory in (ours, theirs))
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale, weight = expected[f"{name}_scale"], source[name]
            once, twice = ((x / scale).to(torch.float8_e4m3fn) for x in (weight.float(), weight))
            assert same(tensor, twice), name
            errors = [(x.float() * scale - weight.float()).square().sum() for x in (once, twice)]
            assert errors[0] <= errors[1], name
            tensor = once
        assert same(own[name], tensor), name
    for file in ("config.json", "hf_quant_config.json"):
        documents = [json.loads((directory / file).read_text()) for directory in (ours, theirs)]
        for document in documents:
            document.get("quantization_config", document).pop("producer")
        assert documents[0] == documents[1], file


def same(ours, theirs):
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def joined(paths, tensors, kind):
    """Rows of the modules as the checkpoint has them: up before gate."""
    whole = torch.cat([tensors[f"{path}.{kind}"] for path in paths])
    return torch.cat(whole.chunk(2)[::-1]) if "gate_up" in paths[0] else whole


def compare_int8(linear, paths, ours, theirs, _):
    assert torch.equal(ours[f"{linear}.weight"], joined(paths, theirs, "weight")), linear
    scales = ours[f"{linear}.weights_scaling_factor"]
    assert torch.equal(scales, joined(paths, theirs, "weight_scale")), linear
    for path in paths:
        smoother = theirs[f"{path}.pre_quant_scale"]
        assert torch.equal(ours[f"{linear}.prequant_scaling_factor"], smoother), path
        (scale,) = ours[f"{linear}.activation_scaling_factor"]
        assert scale == theirs[f"{path}.input_scale"], path


def compare_fp8(linear, paths, ours, theirs, source):
    """Their weights are divided in 16 bits, so rounded twice: further from the source than ours."""
    (scale,) = ours[f"{linear}.weights_scaling_factor"]
    assert scale == max(theirs[f"{path}.weight_scale"] for path in paths), linear
    for path in paths:
        (inputs,) = ours[f"{linear}.activation_scaling_factor"]
        assert inputs == theirs[f"{path}.input_scale"], path
        weight = source[f"{path}.weight"]
        twice = (weight / theirs[f"{path}.weight_scale"]).to(torch.float8_e4m3fn)
        assert torch.equal(twice.float(), theirs[f"{path}.weight"].float()), path
    weight = joined(paths, source, "weight")
    once = (weight.float() / scale).to(torch.float8_e4m3fn)
    assert torch.equal(ours[f"{linear}.weight"].float(), once.float()), linear
    twice = (weight / scale).to(torch.float8_e4m3fn)
    errors = [(x.float() * scale - weight.float()).square().sum() for x in (once, twice)]
    assert errors[0] <= errors[1], linear
