"""transformers with compressed-tensors runs what phireg writes in its layout."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import exports
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import phireg
from phireg import registry
from phireg.calibration.collect import collect
from phireg.reference.load import open_reference

pytest.importorskip("compressed_tensors")
LARGEST = {"fp8": 448.0, "fp8_dynamic": 448.0, "w8a8": 127.0, "w4a16": 7.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return exports.source("phi3", tmp_path_factory.mktemp("compressed") / "model")


@pytest.fixture(scope="module")
def statistics(source):
    family = registry.load("phi3-mini").family
    cpu = torch.device("cpu")
    reference = open_reference(family, source, weights=None, dtype=torch.bfloat16, device=cpu)
    return collect(reference, [row.tolist() for row in exports.rows()], device=cpu)


def on_grid(values, scale, top):
    """Values that the format has, by hand."""
    if top == 448.0:
        return (values / scale).clamp(-top, top).to(torch.float8_e4m3fn).float() * scale
    return (values / scale).round().clamp(-top - 1, top) * scale


def by_hand(source, statistics, qformat):
    """transformers' model with weights and inputs of every linear put on the grid."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    top = LARGEST[qformat]
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.data
        if qformat == "w4a16":
            groups = weight.unflatten(1, (-1, 128))
            scale = (groups.abs().amax(2, keepdim=True) / top).bfloat16().float()
            module.weight.data = on_grid(groups, scale, top).flatten(1)
            continue
        amax = weight.abs().max() if qformat == "fp8" else weight.abs().amax(1, keepdim=True)
        scale = (amax / top).bfloat16().float()
        module.weight.data = on_grid(weight, scale, top)
        largest = torch.tensor(statistics.inputs[name].max())

        def round_inputs(_, inputs, largest=largest):
            (x,) = inputs
            if qformat != "fp8":
                # compressed-tensors spreads 255 steps over both signs when it runs.
                steps = 127.5 if qformat == "w8a8" else top
                return (on_grid(x, x.abs().amax(-1, keepdim=True) / steps, top),)
            return (on_grid(x, (largest / top).bfloat16().float(), top),)

        module.register_forward_pre_hook(round_inputs)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("qformat", LARGEST)
def test_transformers_loads_and_computes_the_same(tmp_path, source, statistics, qformat):
    plan = phireg.plan(source, family="phi3-mini", target="hf-compressed-tensors", qformat=qformat)
    phireg.quantize(plan, tmp_path / "out", statistics if plan.options.calibrated else None)
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = exports.rows()[:1]
    expected = by_hand(source, statistics, qformat)(ids).logits
    actual = model.eval()(ids).logits
    assert (actual - expected).abs().max() < 0.05 * expected.std()
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(ids).logits
    assert (actual - expected).norm() < 0.2 * (plain - expected).norm()
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


@pytest.mark.filterwarnings("ignore")
def test_nvfp4_is_compressed_tensors_own_byte_for_byte(tmp_path, source, statistics):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    exports.compressed("phi3", source, "nvfp4", theirs, dtype=torch.bfloat16)
    plan = phireg.plan(source, family="phi3-mini", target="hf-compressed-tensors", qformat="nvfp4")
    phireg.quantize(plan, ours, statistics)
    expected, actual = (load_file(d / "model.safetensors") for d in (theirs, ours))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
    model, found = AutoModelForCausalLM.from_pretrained(
        ours, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = exports.rows()[:1]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("qformat", (*LARGEST, "nvfp4"))
def test_the_settings_are_those_of_compressed_tensors(tmp_path, source, qformat):
    exports.compressed("phi3", source, qformat, tmp_path, dtype=torch.bfloat16)
    theirs = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    plan = phireg.plan(source, family="phi3-mini", target="hf-compressed-tensors", qformat=qformat)
    ours = dict(plan.config["quantization_config"])
    assert ours.pop("version").rpartition(".")[0] == theirs.pop("version").rpartition(".")[0]
    assert ours == theirs
    kinds = {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    codes = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
    codes |= {"U8": torch.uint8, "F32": torch.float32}
    codes |= {"I32": torch.int32, "I64": torch.int64}
    assert {o.name: (codes[o.dtype], o.shape) for o in plan.outputs} == kinds


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A model whose v feeds o_proj head by head, and statistics with AWQ's factors."""
    directory = tmp_path_factory.mktemp("heads") / "model"
    model = exports.tiny_models.phi3(**exports.SIZES).to(torch.bfloat16)
    model.save_pretrained(directory)
    reference = open_reference(
        registry.load("phi3-mini").family,
        directory,
        weights=None,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    rows = [row.tolist() for row in exports.rows()]
    return directory, collect(reference, rows, device=torch.device("cpu"), search=True)


def unpacked(tensors, module):
    """A weight's values by hand: eight levels + 8 in a word, a scale for each group of 128."""
    words = tensors[f"{module}.weight_packed"].long() & 0xFFFFFFFF
    levels = torch.stack([(words >> 4 * n & 15) - 8 for n in range(8)], dim=2).flatten(1)
    scale = tensors[f"{module}.weight_scale"].float().repeat_interleave(128, dim=1)
    return levels * scale, scale


def test_factors_of_awq_cancel(tmp_path, heads):
    """The norms and rows that have them undo what the linears behind were divided by."""
    source, statistics = heads
    plan = phireg.plan(source, target="hf-compressed-tensors", qformat="int4_awq")
    phireg.quantize(plan, tmp_path / "out", statistics)
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "out", source))
    hidden, inner = exports.SIZES["hidden_size"], exports.SIZES["intermediate_size"]
    for layer in (f"model.layers.{i}" for i in range(3)):
        factors = {}
        for norm, linear in (
            ("input_layernorm", "self_attn.qkv_proj"),
            ("post_attention_layernorm", "mlp.gate_up_proj"),
        ):
            ratio = (
                ours[f"{layer}.{norm}.weight"].float() / theirs[f"{layer}.{norm}.weight"].float()
            )
            factors[linear] = (torch.ones(1), ratio)
            assert (ratio - 1).abs().max() > 0.1
        rows = {name: torch.ones(n) for name, n in (("qkv", 3 * hidden), ("gate_up", 2 * inner))}
        for linear, before, start in (
            ("self_attn.o_proj", "qkv", 2 * hidden),
            ("mlp.down_proj", "gate_up", inner),
        ):
            found = torch.from_numpy(statistics.awq[f"{layer}.{linear}"].copy())
            factors[linear] = (torch.ones(1), found)
            rows[before][start:] = found
        for linear, (_, columns) in factors.items():
            own = {"self_attn.qkv_proj": rows["qkv"], "mlp.gate_up_proj": rows["gate_up"]}
            values, step = unpacked(ours, f"{layer}.{linear}")
            expected = theirs[f"{layer}.{linear}.weight"].float() / columns
            expected *= own.get(linear, torch.ones(1))[:, None]
            assert ((values - expected).abs() <= 0.52 * step + 0.02 * expected.abs()).all()


def test_projections_that_the_source_has_apart_have_the_same_factors(tmp_path, heads):
    source, statistics = heads
    apart = shutil.copytree(source, tmp_path / "apart")
    hidden, inner = exports.SIZES["hidden_size"], exports.SIZES["intermediate_size"]
    sizes = {
        "qkv_proj": dict.fromkeys(("q_proj", "k_proj", "v_proj"), hidden),
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), inner),
    }
    tensors = load_file(source / "model.safetensors")
    inputs, awq = dict(statistics.inputs), dict(statistics.awq)
    for name in list(tensors):
        path, _, last = name.removesuffix(".weight").rpartition(".")
        if last in sizes:
            parts = tensors.pop(name).split(list(sizes[last].values()))
            for part, rows in zip(sizes[last], parts, strict=True):
                tensors[f"{path}.{part}.weight"] = rows.contiguous()
                for kept in (inputs, awq):
                    kept[f"{path}.{part}"] = kept[f"{path}.{last}"]
    save_file(tensors, apart / "model.safetensors")
    for directory, known in (
        (source, statistics),
        (apart, replace(statistics, inputs=inputs, awq=awq)),
    ):
        plan = phireg.plan(directory, target="hf-compressed-tensors", qformat="int4_awq")
        phireg.quantize(plan, tmp_path / f"out-{directory.name}", known)
    left, right = (
        load_file(tmp_path / f"out-{n}" / "model.safetensors") for n in ("model", "apart")
    )
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
