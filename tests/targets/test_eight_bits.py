"""ModelOpt's own exports of fp8 and int8_sq, file for file, with an FP8 KV cache.

Its FP8 weights are divided by their scale in bfloat16, and so rounded twice: that division is made
here again, and ours is never further from the source.
"""

import json
from functools import partial

import modelopt.torch.quantization as mtq
import pytest
import torch
from helpers import exports, tiny_models
from safetensors.torch import load_file

import phireg
from phireg import registry
from phireg.calibration.collect import collect
from phireg.reference.load import open_reference

CPU = torch.device("cpu")
MODELS = {
    "phi2": (tiny_models.phi2, "phi2"),
    "heads": (tiny_models.phi3, "phi3-mini"),
    "groups, long rope": (tiny_models.phi3_gqa, "phi3-medium"),
    "tied": (partial(tiny_models.phi3, tie_word_embeddings=True, vocab_size=107), "phi3-mini"),
}


def one_by_one(model, config, _, quantize=mtq.quantize):
    """Phireg's maxima do not depend on batches."""
    return quantize(model, config, lambda inner: [inner(row[None]) for row in exports.rows()])


def documents(directory):
    """config.json and the sidecar without who wrote them."""
    config = json.loads((directory / "config.json").read_text())
    sidecar = json.loads((directory / "hf_quant_config.json").read_text())
    config["quantization_config"].pop("producer")
    sidecar.pop("producer")
    config.pop("transformers_version", None)
    return config, sidecar


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_modelopts_export(tmp_path, monkeypatch, name):
    monkeypatch.setattr(mtq, "quantize", one_by_one)
    make, family = MODELS[name]
    directory = tmp_path / "source"
    make().to(torch.bfloat16).save_pretrained(directory)
    source = load_file(directory / "model.safetensors")
    reference = open_reference(
        registry.load(family).family, directory, weights=None, dtype=torch.bfloat16, device=CPU
    )
    statistics = collect(reference, [row.tolist() for row in exports.rows()], device=CPU)
    for qformat in ("fp8", "int8_sq"):
        out, other = tmp_path / qformat, tmp_path / f"modelopt-{qformat}"
        exports.modelopt("", directory, qformat, other, dtype=torch.bfloat16, run=False)
        plan = phireg.plan(
            directory,
            family=family,
            target="hf-modelopt",
            qformat=qformat,
            kv_cache_dtype="fp8",
            dtype="bfloat16",
        )
        phireg.quantize(plan, out, statistics)
        assert documents(out) == documents(other)
        ours, theirs = (load_file(d / "model.safetensors") for d in (out, other))
        assert ours.keys() == theirs.keys()
        weights = 0
        for key, tensor in theirs.items():
            assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
            if tensor.dtype != torch.float8_e4m3fn:
                assert torch.equal(ours[key], tensor), key
                continue
            weights += 1
            weight, scale = source[key], theirs[f"{key}_scale"]
            # A scalar of float32 leaves the quotient in bfloat16.
            twice = (weight / scale).to(torch.float8_e4m3fn)
            assert torch.equal(twice.float(), tensor.float()), key
            once = (weight.float() / scale).to(torch.float8_e4m3fn)
            assert torch.equal(ours[key].float(), once.float()), key
            mine, other_error = (
                (x[key].float() * scale - weight.float()).square().sum() for x in (ours, theirs)
            )
            assert mine <= other_error, key
        assert weights == (0 if qformat == "int8_sq" else 3 * (6 if name == "phi2" else 4))
