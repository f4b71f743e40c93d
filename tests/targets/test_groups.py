"""Weights in ModelOpt's layout are its own export's, byte for byte."""

import json

import modelopt.torch.quantization as mtq
import pytest
import torch
from helpers import exports
from safetensors.torch import load_file

import phireg
from phireg import registry
from phireg.calibration.collect import collect
from phireg.reference.load import open_reference

CPU = torch.device("cpu")


def statistics_of(directory, family):
    reference = open_reference(
        registry.load(family).family, directory, weights=None, dtype=torch.bfloat16, device=CPU
    )
    return collect(reference, [row.tolist() for row in exports.rows()], device=CPU, search=True)


def bits(tensor):
    return tensor.shape, tensor.dtype, tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.fixture
def row_by_row(monkeypatch):
    """ModelOpt's maxima and losses depend on batches; phireg's on rows alone."""
    quantize = mtq.quantize

    def one_by_one(model, config, _):
        return quantize(model, config, lambda inner: [inner(row[None]) for row in exports.rows()])

    monkeypatch.setattr(mtq, "quantize", one_by_one)


# phi's AWQ exports, whose norms carry the factors, are in test_modelopt_groups.py.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "family", "qformats"),
    [
        ("phi3", "phi3-mini", ("int4_awq", "w4a8_awq", "nvfp4", "fp8_pc_pt", "int8_wo")),
        ("phi2", "phi2", ("nvfp4",)),
    ],
)
def test_modelopts_export_byte_for_byte(tmp_path, row_by_row, name, family, qformats):
    source = exports.source(name, tmp_path / "model")
    statistics = statistics_of(source, family)
    for qformat in qformats:
        theirs, ours = tmp_path / f"{qformat}-modelopt", tmp_path / qformat
        exports.modelopt(name, source, qformat, theirs, dtype=torch.bfloat16, run=False)
        plan = phireg.plan(
            source, family=family, target="hf-modelopt", qformat=qformat, kv_cache_dtype="fp8"
        )
        phireg.quantize(plan, ours, statistics)
        expected, actual = (load_file(d / "model.safetensors") for d in (theirs, ours))
        assert actual.keys() == expected.keys()
        for tensor in expected:
            assert bits(actual[tensor]) == bits(expected[tensor]), tensor
        for file in ("config.json", "hf_quant_config.json"):
            documents = [json.loads((d / file).read_text()) for d in (theirs, ours)]
            for document in documents:
                document.get("quantization_config", document).pop("producer")
            assert documents[0] == documents[1]


@pytest.mark.parametrize("qformat", ["int4_awq", "nvfp4"])
def test_inputs_that_are_no_groups_are_refused(tmp_path, qformat):
    sizes = exports.SIZES | {"intermediate_size": 248}
    model = exports.tiny_models.phi3(**sizes).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    plan = phireg.plan(tmp_path, target="hf-modelopt", qformat=qformat)
    assert {finding.subject for finding in plan.errors} == {
        f"model.layers.{layer}.mlp.down_proj" for layer in range(3)
    }
    plan = phireg.plan(tmp_path, target="hf-modelopt", qformat=qformat, exclude=["*down_proj"])
    assert not plan.errors
    assert plan.documents["hf_quant_config.json"]["quantization"]["exclude_modules"] == sorted(
        ["lm_head", "model.embed_tokens", *(f"model.layers.{i}.mlp.down_proj" for i in range(3))]
    )
