"""--quantize-lm-head and --exclude: what is quantized, and what readers are told."""

import copy
import json

import pytest
import torch
from helpers import tiny_models as sources
from helpers.tiny_models import from_pretrained, opened
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import phireg
from phireg.calibration.collect import collect
from phireg.errors import UsageError

if sources.FOUR:
    pytest.skip("nvidia-modelopt needs a newer transformers", allow_module_level=True)
mtq = pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is missing")

CONFIGS = {"fp8": "FP8_DEFAULT_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG"}
ROWS = [
    torch.randint(1, 100, (n,), generator=torch.Generator().manual_seed(n))
    for n in (9, 30, *range(48, 64))
]
BF16 = torch.bfloat16


def statistics(name, directory):
    rows = [row.tolist() for row in ROWS]
    return collect(opened(name, directory, BF16), rows, device=torch.device("cpu"))


def planned(name, directory, **options):
    family = sources.MODELS[name][1]
    return phireg.plan(directory, family=family, target="hf-modelopt", **options)


def exported(name, directory, qformat, out):
    """ModelOpt's export with lm_head's quantizers switched on."""
    from modelopt.torch.export import export_hf_checkpoint

    config = copy.deepcopy(getattr(mtq, CONFIGS[qformat]))
    config["quant_cfg"] = [x for x in config["quant_cfg"] if x["quantizer_name"] != "*lm_head*"]
    model = from_pretrained(name, directory, BF16)
    with torch.no_grad():
        model = mtq.quantize(model, config, lambda inner: [inner(row[None]) for row in ROWS])
        export_hf_checkpoint(model, export_dir=out)
    return load_file(out / "model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "qformat"), [("phi2", "fp8"), ("phi3-gqa", "fp8"), ("phi3-gqa", "int8_sq")]
)
def test_a_quantized_head_is_modelopts(tmp_path, name, qformat):
    directory = sources.write(name, tmp_path / "source", BF16)
    theirs = exported(name, directory, qformat, tmp_path / "theirs")
    out = tmp_path / "ours"
    plan = planned(name, directory, qformat=qformat, quantize_lm_head=True)
    phireg.quantize(plan, out, statistics(name, directory))
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert ours["lm_head.weight"].dtype == theirs["lm_head.weight"].dtype != BF16
    for tensor in (x for x in theirs if x.startswith("lm_head.")):
        expected = theirs[tensor].float()
        if ours[tensor].dtype == torch.float8_e4m3fn:  # which ModelOpt rounds twice
            weight = load_file(directory / "model.safetensors")[tensor].float()
            expected = (weight / theirs[f"{tensor}_scale"]).to(torch.float8_e4m3fn).float()
        assert torch.equal(ours[tensor].float(), expected), tensor
    for file in ("config.json", "hf_quant_config.json"):
        documents = [json.loads((x / file).read_text()) for x in (out, tmp_path / "theirs")]
        for document in documents:
            document.get("quantization_config", document).pop("producer")
        assert documents[0] == documents[1], file
    result = phireg.verify(out, directory, device="cpu")
    assert result.verdict == "verified"


def test_heads_that_cannot_be_quantized_are_refused(tmp_path):
    tied, own = (sources.write(name, tmp_path / name) for name in ("phi3-tied", "phi2"))
    (finding,) = planned("phi3-tied", tied, qformat="fp8", quantize_lm_head=True).errors
    assert finding.subject == "lm_head"
    for options in ({"qformat": "int4_awq"}, {}):
        with pytest.raises(UsageError):
            planned("phi2", own, quantize_lm_head=True, **options)
    with pytest.raises(UsageError):
        phireg.plan(own, family="phi2", qformat="fp8", quantize_lm_head=True)


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
def test_excluded_modules_stay_in_the_models_dtype_and_are_listed(tmp_path, qformat):
    directory = sources.write("phi2", tmp_path / "source", BF16)
    patterns = ["*.fc2", "model.layers.1.*", "lm_head"]
    plan = planned("phi2", directory, qformat=qformat, exclude=patterns, kv_cache_dtype="fp8")
    out = tmp_path / "out"
    phireg.quantize(plan, out, statistics("phi2", directory))
    attention = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")]
    alone = {f"model.layers.{layer}.mlp.fc2" for layer in range(3)}
    alone |= {f"model.layers.1.{name}" for name in (*attention, "mlp.fc1")}
    quantized = {f"model.layers.{i}.{x}" for i in (0, 2) for x in (*attention, "mlp.fc1")}
    ours, source = (load_file(x / "model.safetensors") for x in (out, directory))
    for name in alone:
        assert torch.equal(ours[f"{name}.weight"], source[f"{name}.weight"])
    assert {x.removesuffix(".weight_scale") for x in ours if "weight_scale" in x} == quantized
    assert all(ours[f"{name}.weight"].dtype != BF16 for name in quantized)
    # A KV cache is no linear: its scales stay.
    assert {x for x in ours if "k_scale" in x} == {
        f"model.layers.{layer}.self_attn.k_proj.k_scale" for layer in range(3)
    }
    listed = sorted({*alone, "lm_head", "model.embed_tokens"})
    config, sidecar = (
        json.loads((out / file).read_text()) for file in ("config.json", "hf_quant_config.json")
    )
    assert config["quantization_config"]["ignore"] == listed
    assert sidecar["quantization"]["exclude_modules"] == listed
    assert phireg.verify(out, directory, device="cpu").verdict == "verified"


def test_patterns_that_match_nothing_are_errors_all_at_once(tmp_path):
    directory = sources.write("phi2", tmp_path)
    plan = planned("phi2", directory, qformat="fp8", exclude=["*.fc3", "*.fc1", "layers.0"])
    assert {finding.subject for finding in plan.errors} == {"*.fc3", "layers.0"}
    (error,) = planned("phi2", directory, qformat="fp8", exclude=["*"]).errors
    assert "--exclude" in error.detail
    both = {"exclude": ["lm_head"], "quantize_lm_head": True}
    (error,) = planned("phi2", directory, qformat="fp8", **both).errors
    assert error.subject == "lm_head"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("qformat", ["fp8", "w8a8"])
def test_transformers_takes_a_quantized_head_and_excluded_linears(tmp_path, qformat):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is missing")
    directory, out = sources.write("phi2", tmp_path / "source", torch.float32), tmp_path / "out"
    plan = phireg.plan(
        directory,
        family="phi2",
        target="hf-compressed-tensors",
        qformat=qformat,
        dtype="float32",
        quantize_lm_head=True,
        exclude=["model.layers.1.mlp.*"],
    )
    phireg.quantize(plan, out, statistics("phi2", directory) if qformat == "fp8" else None)
    left = ["model.layers.1.mlp.fc1", "model.layers.1.mlp.fc2"]
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block["ignore"] == left
    read, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    schemes = {n for n, m in read.named_modules() if getattr(m, "quantization_scheme", None)}
    assert "lm_head" in schemes
    assert schemes.isdisjoint(left)
    with torch.no_grad():
        logits, plain = (
            model(ROWS[1][None]).logits[0]
            for model in (read.eval(), from_pretrained("phi2", directory, torch.float32))
        )
    assert 0 < (logits - plain).norm() < 0.4 * plain.norm()
    assert phireg.verify(out, directory, device="cpu").verdict == "verified"
