"""Tied heads in float16, and phi-2, whose norms carry AWQ's factors, beside ModelOpt's exports."""

import copy
import dataclasses
import json

import pytest
import torch
from helpers import tiny_models as sources
from helpers.tiny_models import from_pretrained, opened
from safetensors.torch import load_file

import phireg
from phireg.calibration.collect import collect
from phireg.errors import PlanError

if sources.FOUR:
    pytest.skip("nvidia-modelopt needs a newer transformers", allow_module_level=True)
mtq = pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is missing")

CONFIGS = {
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
TIED, PHI = "phi3-tied-grouped", "phi2-grouped"
ALIKE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")


def rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 100, (n,), generator=generator).tolist() for n in (40, 12, 17, 40)]


def exported(name, directory, dtype, qformat, out):
    from modelopt.torch.export import export_hf_checkpoint

    def forward(model):
        for row in rows():
            model(torch.tensor([row]))

    model = from_pretrained(name, directory, dtype)
    with torch.no_grad():
        config = copy.deepcopy(getattr(mtq, CONFIGS[qformat]))
        export_hf_checkpoint(mtq.quantize(model, config, forward), export_dir=out)


def both(tmp_path, name, dtype, qformats):
    """By format our tensors and theirs; the source's tensors; the statistics."""
    directory = sources.write(name, tmp_path / "source", dtype)
    reference = opened(name, directory, dtype)
    statistics = collect(reference, rows(), device=torch.device("cpu"), search=True)
    exports = {}
    for qformat in qformats:
        theirs, ours = tmp_path / f"{qformat}-modelopt", tmp_path / qformat
        exported(name, directory, dtype, qformat, theirs)
        plan = phireg.plan(
            directory,
            family=sources.GROUPED[name][1],
            target="hf-modelopt",
            qformat=qformat,
            dtype=str(dtype).removeprefix("torch."),
        )
        phireg.quantize(plan, ours, statistics)
        configs = [json.loads((d / "hf_quant_config.json").read_text()) for d in (ours, theirs)]
        assert configs[0]["quantization"] == configs[1]["quantization"]
        exports[qformat] = [load_file(d / "model.safetensors") for d in (ours, theirs)]
        assert exports[qformat][0].keys() == exports[qformat][1].keys()
    return exports, load_file(directory / "model.safetensors"), statistics


def same(ours, theirs):
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_in_float16(tmp_path):
    exports, _, _ = both(tmp_path, TIED, torch.float16, ("int4_awq",))
    for ours, theirs in exports.values():
        assert "lm_head.weight" not in ours
        assert [name for name in theirs if not same(ours[name], theirs[name])] == []


def test_linears_that_are_left_out_are_not_searched(tmp_path):
    """Their inputs may be no whole groups; all others are searched, and must have been."""
    sources.phi2(hidden_size=128, intermediate_size=168).save_pretrained(tmp_path / "source")
    reference = opened(PHI, tmp_path / "source")
    found = collect(reference, rows(), device=torch.device("cpu"), search=True)
    left = {name.rpartition(".")[2] for name in found.inputs.keys() - found.awq.keys()}
    assert left == {"fc2", "lm_head"}
    plan = phireg.plan(
        tmp_path / "source",
        target="hf-modelopt",
        qformat="int4_awq",
        dtype="float32",
        exclude=["*fc2"],
    )
    phireg.quantize(plan, tmp_path / "ours", found)
    unsearched = dataclasses.replace(found, awq={})
    with pytest.raises(PlanError, match=r"q_proj.*no factors of AWQ"):
        phireg.quantize(plan, tmp_path / "none", unsearched)
    assert not (tmp_path / "none").exists()


def packed(weight):
    """Levels and scales of a smoothed weight by hand: [rows / 2, inputs] and [rows, groups]."""
    groups = weight.float().unflatten(1, (-1, 128))
    scales = groups.abs().amax(2) / 7
    levels = (groups / scales[:, :, None]).round().flatten(1).to(torch.int8) & 15
    return (levels[0::2] | levels[1::2] << 4).view(torch.uint8), scales


def unpacked(levels, scales):
    halves = torch.stack([levels & 15, levels >> 4], 1).flatten(0, 1).to(torch.int8)
    signed = torch.where(halves > 7, halves - 16, halves).float()
    return (signed.unflatten(1, (-1, 128)) * scales[:, :, None]).flatten(1)


@pytest.mark.filterwarnings("ignore")
def test_phis_norms_carry_the_mean_of_the_factors(tmp_path):
    """ModelOpt rounds the weights of the linears that share a norm twice, phireg once."""
    dtype = torch.bfloat16
    exports, source, statistics = both(tmp_path, PHI, dtype, ("int4_awq", "w4a8_awq"))
    for qformat, (ours, theirs) in exports.items():
        different = {name for name in theirs if not same(ours[name], theirs[name])}
        once, twice = 0.0, 0.0
        for layer in range(3):
            names = [f"model.layers.{layer}.{name}" for name in ALIKE]
            found = [torch.from_numpy(statistics.awq[name]) for name in names]
            mean = torch.stack([x.to(dtype) for x in found]).mean(0)
            norm = f"model.layers.{layer}.input_layernorm"
            for kind in ("weight", "bias"):
                assert same(ours[f"{norm}.{kind}"], source[f"{norm}.{kind}"] * mean)
            assert not torch.equal(mean, torch.ones_like(mean))
            second = set()
            for name, factor in zip(names, found, strict=True):
                weight = source[f"{name}.weight"]
                rounded = (weight * (1 / factor)).to(dtype).float() * factor.to(dtype).float()
                expected = packed((rounded / mean.float()).to(dtype))
                tensors = f"{name}.weight", f"{name}.weight_scale"
                assert [same(theirs[x], y) for x, y in zip(tensors, expected, strict=True)] == [
                    True
                ] * 2
                expected = packed((weight * (1 / mean.float())).to(dtype))
                assert [same(ours[x], y) for x, y in zip(tensors, expected, strict=True)] == [
                    True
                ] * 2
                errors = [
                    unpacked(*(export[x] for x in tensors)) * mean.float() - weight.float()
                    for export in (ours, theirs)
                ]
                once, twice = (
                    e + x.square().sum() for e, x in zip((once, twice), errors, strict=True)
                )
                different -= {*tensors, f"{name}.weight_scale_2"}
                second.add(ours.get(f"{name}.weight_scale_2"))
            if qformat == "w4a8_awq":
                levels = max(x[f"{n}.weight_scale"].max() * 7 for n in names for x in (ours,))
                assert {x.item() for x in second} == {(levels / 448).item()}
        assert different == set()
        assert once <= twice
