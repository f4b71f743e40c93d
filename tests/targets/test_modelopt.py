"""Directories and rank files beside nvidia-modelopt's own exports of the same model and token ids.

Both calibrate in the model's dtype with the same attention (SDPA, transformers' default), text by
text: another kernel, dtype or batch moves maxima by a rounding step, which SmoothQuant's vectors
show. Rank files of formats with groups are in test_rank_groups.py.
"""

import dataclasses
import json

import pytest
import torch
from helpers import exports
from helpers import tiny_models as sources
from safetensors.torch import load_file

import phireg
from phireg.calibration.collect import collect
from phireg.errors import PlanError

if sources.FOUR:
    pytest.skip("nvidia-modelopt needs a newer transformers", allow_module_level=True)
pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is missing")

BF16, F16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
GQA, TIED, PHI = "phi3-gqa-grouped", "phi3-tied-grouped", "phi2-grouped"
GROUPS = ("int4_awq", "w4a8_awq", "nvfp4")
LINEARS = {
    "attention.dense": ("self_attn.dense", "self_attn.o_proj"),
    "mlp.fc": ("mlp.fc1", "mlp.gate_up_proj"),
    "mlp.proj": ("mlp.fc2", "mlp.down_proj"),
    "attention.qkv": [f"self_attn.{part}_proj" for part in ("qkv", "q", "k", "v")],
}  # fmt: skip
ALIKE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
"""Of phi-2 what sees the output of one norm."""


def texts():
    """One of them beyond the original context of long rope, two of one length."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 100, (n,), generator=generator).tolist() for n in (40, 12, 17, 40)]


class Exports:
    """A source, statistics of it, and our directories and ModelOpt's."""

    def __init__(self, name, dtype, root):
        self.name, self.dtype, self.root = name, dtype, root
        self.source = sources.write(name, root / "source", dtype)
        self.weights = load_file(self.source / "model.safetensors")
        self.statistics = self.collect(search=name in sources.GROUPED)

    def collect(self, **options):
        reference = sources.opened(self.name, self.source, self.dtype)
        return collect(reference, texts(), device=torch.device("cpu"), **options)

    def quantize(self, out, qformat, **options):
        plan = phireg.plan(
            self.source,
            family=(sources.MODELS | sources.GROUPED)[self.name][1],
            qformat=qformat,
            dtype=str(self.dtype).removeprefix("torch."),
            **options,
        )
        phireg.quantize(plan, self.root / out, self.statistics)
        return load_file(next((self.root / out).glob("*.safetensors")))

    def both(self, qformat):
        """Our tensors and theirs, of the same names, under the same settings."""
        ours, theirs = self.root / qformat, self.root / f"{qformat}-modelopt"
        cache = "awq" not in qformat  # with one, ModelOpt's search computes with its 8 bits
        options = {"dtype": self.dtype, "cache": cache, "run": False, "texts": texts()}
        exports.modelopt(self.name, self.source, qformat, theirs, **options)
        kv_cache = "fp8" if cache else None
        own = self.quantize(ours, qformat, target="hf-modelopt", kv_cache_dtype=kv_cache)
        expected = load_file(theirs / "model.safetensors")
        assert own.keys() == expected.keys()
        for file in ("config.json", "hf_quant_config.json"):
            documents = [json.loads((directory / file).read_text()) for directory in (ours, theirs)]
            for document in documents:
                document.get("quantization_config", document).pop("producer")
            assert documents[0] == documents[1], file
        return own, expected


def same(ours, theirs):
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "dtype", "qformats"),
    [
        (GQA, BF16, (*GROUPS, "fp8_pc_pt", "int8_wo")),
        (TIED, F16, ("int4_awq",)),
        (PHI, BF16, ("nvfp4",)),
    ],
)
def test_directories_are_modelopts_byte_for_byte(tmp_path, name, dtype, qformats):
    """AWQ's factors stand in them, so its search is ModelOpt's, whatever the batches are."""
    made = Exports(name, dtype, tmp_path)
    for qformat in qformats:
        ours, theirs = made.both(qformat)
        assert [tensor for tensor in theirs if not same(ours[tensor], theirs[tensor])] == []
        assert ("lm_head.weight" in ours) == (name != TIED)
    searched = made.statistics.awq
    batched = made.collect(search=True, batch_size=2).awq
    assert batched.keys() == searched.keys()
    assert all((batched[linear] == searched[linear]).all() for linear in searched)
    assert len(searched) == 3 * (6 if name == PHI else 4)
    assert len({x for factors in searched.values() for x in factors.tolist()}) > 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", ["phi2", "phi3-tied", "phi3-gqa"])
def test_every_scale_and_weight_of_eight_bits_is_modelopts(tmp_path, name, dtype):
    """Of directories, and of the rank files from the same statistics.

    Only FP8 weights differ, where ModelOpt rounds them twice, in 16 bits and to e4m3: theirs are
    its division repeated here, ours are rounded once and no further from the source.
    """
    made = Exports(name, dtype, tmp_path)
    for qformat, compare in (("fp8", compare_fp8), ("int8_sq", compare_int8)):
        ours, theirs = made.both(qformat)
        for tensor, stored in theirs.items():
            expected = stored
            if stored.dtype == E4M3:
                scale = theirs[f"{tensor}_scale"]
                expected, twice = rounded(made.weights[tensor], scale)
                assert same(stored, twice), tensor
            assert same(ours[tensor], expected), tensor
        ranks, compared = made.quantize(f"{qformat}-ranks", qformat), 0
        for layer in range(3):
            for target, candidates in LINEARS.items():
                paths = [f"model.layers.{layer}.{path}" for path in candidates]
                paths = [path for path in paths if f"{path}.weight" in theirs]
                compared += len(paths)
                linear = f"transformer.layers.{layer}.{target}"
                compare(linear, paths, ranks, theirs, made.weights)
        assert compared == 3 * (6 if name == "phi2" else 4)


def rounded(weight, scale):
    """A weight rounded to e4m3 once, and in its own dtype before, which is further from it."""
    once, twice = ((x / scale).to(E4M3) for x in (weight.float(), weight))
    errors = [(x.float() * scale - weight.float()).square().sum() for x in (once, twice)]
    assert errors[0] <= errors[1]
    return once, twice


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
    (scale,) = ours[f"{linear}.weights_scaling_factor"]
    assert scale == max(theirs[f"{path}.weight_scale"] for path in paths), linear
    (inputs,) = ours[f"{linear}.activation_scaling_factor"]
    assert all(inputs == theirs[f"{path}.input_scale"] for path in paths), linear
    once, _ = rounded(joined(paths, source, "weight"), scale)
    assert same(ours[f"{linear}.weight"], once), linear


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
def test_phis_norms_carry_the_mean_of_awqs_factors(tmp_path):
    """ModelOpt rounds the weights of the linears that share a norm twice, phireg once."""
    made = Exports(PHI, BF16, tmp_path)
    for qformat in ("int4_awq", "w4a8_awq"):
        ours, theirs = made.both(qformat)
        different = {name for name in theirs if not same(ours[name], theirs[name])}
        once, twice = 0.0, 0.0
        for layer in range(3):
            names = [f"model.layers.{layer}.{name}" for name in ALIKE]
            found = [torch.from_numpy(made.statistics.awq[name]) for name in names]
            mean = torch.stack([x.to(BF16) for x in found]).mean(0)
            norm = f"model.layers.{layer}.input_layernorm"
            for kind in ("weight", "bias"):
                assert same(ours[f"{norm}.{kind}"], made.weights[f"{norm}.{kind}"] * mean)
            assert not torch.equal(mean, torch.ones_like(mean))
            second = set()
            for name, factor in zip(names, found, strict=True):
                weight = made.weights[f"{name}.weight"]
                before = (weight * (1 / factor)).to(BF16).float() * factor.to(BF16).float()
                tensors = f"{name}.weight", f"{name}.weight_scale"
                for export, expected in (
                    (theirs, packed((before / mean.float()).to(BF16))),
                    (ours, packed((weight * (1 / mean.float())).to(BF16))),
                ):
                    assert all(same(export[x], y) for x, y in zip(tensors, expected, strict=True))
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
                levels = max(ours[f"{name}.weight_scale"].max() * 7 for name in names)
                assert {x.item() for x in second} == {(levels / 448).item()}
        assert different == set()
        assert once <= twice


def test_linears_that_are_left_out_are_not_searched(tmp_path):
    """Their inputs may be no whole groups; all others are searched, and must have been."""
    sources.phi2(hidden_size=128, intermediate_size=168).save_pretrained(tmp_path / "source")
    reference = sources.opened(PHI, tmp_path / "source")
    found = collect(reference, texts(), device=torch.device("cpu"), search=True)
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


@pytest.mark.parametrize("qformat", ["int4_awq", "nvfp4"])
def test_inputs_that_are_no_groups_are_refused(tmp_path, qformat):
    sources.phi3(**exports.SIZES | {"intermediate_size": 248}).to(BF16).save_pretrained(tmp_path)
    plan = phireg.plan(tmp_path, target="hf-modelopt", qformat=qformat)
    assert {finding.subject for finding in plan.errors} == {
        f"model.layers.{layer}.mlp.down_proj" for layer in range(3)
    }
    plan = phireg.plan(tmp_path, target="hf-modelopt", qformat=qformat, exclude=["*down_proj"])
    assert not plan.errors
    assert plan.documents["hf_quant_config.json"]["quantization"]["exclude_modules"] == sorted(
        ["lm_head", "model.embed_tokens", *(f"model.layers.{i}.mlp.down_proj" for i in range(3))]
    )
