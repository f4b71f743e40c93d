"""verify on Hugging Face directories: sound exports pass, planted errors are found and located."""

import json
import os

import pytest
import torch
from helpers import exports, tiny_models
from helpers.command_line import run_phireg
from safetensors.torch import load_file, save_file

import phireg
from phireg.verification.result import QUICK

pytestmark = [
    pytest.mark.skipif(tiny_models.FOUR, reason="the exporters need a newer transformers"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {n: exports.source(n, root / n) for n in exports.MAKERS}


@pytest.fixture(scope="session")
def exported(sources, tmp_path_factory):
    """A function from package, family and format to an export, each made once."""
    root, made = tmp_path_factory.mktemp("exports"), {}

    def export(package, family, form, shard="5GB"):
        pytest.importorskip({"modelopt": "modelopt"}.get(package, "compressed_tensors"))
        key = package, family, form, shard
        if key not in made:
            made[key] = root / "-".join(key)
            options = {"shard": shard, "dtype": torch.bfloat16}
            if package == "modelopt":
                exports.modelopt(family, sources[family], form, made[key], run=False, **options)
            else:
                exports.compressed(family, sources[family], form, made[key], **options)
        return made[key]

    return export


CASES = [("modelopt", "phi3", form) for form in exports.MODELOPT]
CASES += [("compressed", "phi3", form) for form in exports.COMPRESSED]
CASES += [("modelopt", "phi2", "w4a8_awq"), ("modelopt", "phi2", "fp8")]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_sound_exports_pass(case, exported, sources):
    result = phireg.verify(exported(*case), sources[case[1]], checks=(*QUICK, "logits"))
    assert result.passed, [problem for check in result.checks for problem in check.problems]
    assert "quantized linears" in result.check("weights").summary


def test_a_plain_directory_is_compared_bit_for_bit(sources, tmp_path):
    directory = copied(sources["phi3"], tmp_path)
    assert phireg.verify(directory, sources["phi3"]).verdict == "verified"
    change(directory, "model.norm.weight", lambda t: t.index_fill(0, torch.tensor([3]), 2.0))
    (problem,) = phireg.verify(directory, sources["phi3"], checks=QUICK).check("weights").problems
    assert problem.where == "model.norm.weight"


WRONG = {
    "architecture": ("phi2", {}, "architecture", "config.json"),
    "sizes": ("phi3", {"intermediate_size": 96}, "intermediate_size", "mlp.down_proj.weight"),
    "fewer layers": ("phi3", {"num_hidden_layers": 2}, "num_layers", "layers"),
    "more layers": ("phi3", {"num_hidden_layers": 4}, "num_layers", "layers"),
}


@pytest.fixture(scope="session")
def wrong(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    return {
        kind: exports.source(name, root / kind, **changes)
        for kind, (name, changes, *_) in WRONG.items()
    }


@pytest.mark.parametrize(
    ("target", "qformat"),
    [("hf", None), ("hf-modelopt", "fp8_pc_pt"), ("hf-compressed-tensors", "fp8_dynamic")],
)
def test_another_model_is_named_and_no_value_compared(target, qformat, sources, wrong, tmp_path):
    directory = sources["phi3"]
    if qformat:
        directory = tmp_path / "q"
        plan = phireg.plan(sources["phi3"], qformat=qformat, target=target)
        phireg.quantize(plan, directory)
    for kind, (_, _, setting, tensor) in WRONG.items():
        result = phireg.verify(directory, wrong[kind], checks=(*QUICK, "reading", "logits"))
        found = {c.name: [p.where for p in c.problems] for c in result.checks}
        assert f"config.json: {setting}" in found["config"], kind
        assert any(where.endswith(tensor) for where in found["weights"]), (kind, found)
        assert len(found["reading"]) == len(found["logits"]) == 1, kind
        assert not any("Architecture(" in p.text for p in result.check("config").problems)


def test_what_the_source_leaves_open_is_held_against_the_manifest(sources, tmp_path):
    """A level that is the source's other neighbor, and a scale one percent off."""
    directory = tmp_path / "q"
    plan = phireg.plan(sources["phi3"], qformat="fp8_pc_pt", target="hf-modelopt")
    phireg.quantize(plan, directory)
    name = "model.layers.1.self_attn.o_proj."
    written = load_file(directory / "model.safetensors")
    weight = load_file(sources["phi3"] / "model.safetensors")[name + "weight"].float()
    levels = written[name + "weight"]
    beyond = weight / written[name + "weight_scale"][:, None] > levels.float()
    other = levels.view(torch.uint8) + torch.where(beyond, 1, 255).byte()
    inner = (levels.float() > 1) & (levels.float() < 400)
    other = torch.where(inner, other, levels.view(torch.uint8)).view(levels.dtype)
    for part, edit in (("weight", lambda t: other), ("weight_scale", lambda t: t * 1.01)):
        changed = copied(directory, tmp_path / part)
        change(changed, name + part, edit)
        (problem,) = phireg.verify(changed, sources["phi3"], checks=QUICK).check("weights").problems
        assert name + part in problem.where
        assert (problem.layer, problem.part) == (1, "attention")
        (changed / "phireg.json").unlink()
        assert phireg.verify(changed, sources["phi3"], checks=QUICK).passed


def copied(directory, tmp_path):
    target = tmp_path / "copy"
    target.mkdir(parents=True)
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def change(directory, name, edit, *more):
    """Replace one tensor, or several, by what ``edit`` makes of it."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            names = (name, *more)
            edited = edit(*(tensors[each] for each in names))
            pairs = zip(names, edited if more else (edited,), strict=True)
            tensors |= {each: tensor.clone() for each, tensor in pairs}
            save_file(tensors, file, {"format": "pt"})
            return
    raise AssertionError(name)


def swapped_halves(weight, *_):
    rows = weight.view(torch.uint8)
    return torch.cat(rows.chunk(2)[::-1]).view(weight.dtype)


def nibbles(weight):
    raw = weight.view(torch.uint8)
    return ((raw >> 4) | (raw << 4)).view(weight.dtype)


LAYER = "model.layers.1."
PLANTED = {
    "halves": ("fp8", "mlp.gate_up_proj.weight", swapped_halves, "exchanged"),
    "scale": ("fp8", "mlp.down_proj.weight_scale", None, "self_attn.o_proj"),
    "rows": ("int8_sq", "self_attn.qkv_proj.weight_scale", lambda t: t.roll(1), "scaled"),
    "nibbles": ("int4_awq", "mlp.down_proj.weight", nibbles, "other order"),
    "pre-scale": ("int8_sq", "self_attn.o_proj.pre_quant_scale", torch.ones_like, "divided"),
}
PLANTED_COMPRESSED = {
    "halves": ("fp8", "mlp.gate_up_proj.weight", swapped_halves, "exchanged"),
    "scale": ("fp8", "mlp.down_proj.weight_scale", None, "self_attn.o_proj"),
    "rows": ("w8a8", "self_attn.qkv_proj.weight_scale", lambda t: t.roll(1, 0), "scaled"),
    "words": ("w4a16", "mlp.down_proj.weight_packed", nibbles, "other order"),
    "nibbles": ("nvfp4", "self_attn.o_proj.weight_packed", nibbles, "other order"),
}


@pytest.mark.parametrize(
    ("package", "mistake"),
    [("modelopt", name) for name in PLANTED] + [("compressed", n) for n in PLANTED_COMPRESSED],
)
def test_planted_errors_are_named_with_their_place(package, mistake, exported, sources, tmp_path):
    form, name, edit, words = {"modelopt": PLANTED, "compressed": PLANTED_COMPRESSED}[package][
        mistake
    ]
    directory = copied(exported(package, "phi3", form), tmp_path)
    if edit is None:  # the scale of another module
        other = f"{LAYER}self_attn.o_proj.weight_scale"
        change(directory, LAYER + name, lambda own, others: (others, others), other)
    else:
        change(directory, LAYER + name, edit)
    result = phireg.verify(directory, sources["phi3"], checks=QUICK)
    problems = result.check("weights").problems
    assert [problem.where for problem in problems] == [LAYER + name]
    assert words in problems[0].text
    assert (problems[0].layer, result.verdict) == (1, "failed")


def test_what_is_sound_beside_a_damaged_shard_is_checked(sources, tmp_path):
    phireg.convert(
        phireg.plan(sources["phi3"], target="hf", max_shard_size=150_000), tmp_path / "x"
    )
    shards = sorted((tmp_path / "x").glob("model-*.safetensors"))
    os.truncate(shards[1], 3000)
    shards[2].unlink()
    result = phireg.verify(tmp_path / "x", sources["phi3"])
    (problem,) = result.check("structure").problems
    assert shards[1].name in problem.text and shards[2].name in problem.text and problem.hint
    verdicts = {check.name: check.verdict for check in result.checks}
    assert (verdicts["config"], verdicts["reading"]) == ("passed", "passed")
    assert (verdicts["weights"], verdicts["logits"]) == ("skipped", "failed")


def test_sizes_of_another_model_hide_its_other_settings(sources, wrong, tmp_path):
    checkpoint = tmp_path / "ckpt"
    phireg.convert(phireg.plan(sources["phi3"]), checkpoint)
    for place in (sources["phi3"], checkpoint):
        command = ("verify", place, "--model-dir", wrong["architecture"], "--quick")
        done = run_phireg(*command)
        assert done.exit_code == 4
        rows = done.output.splitlines()
        first, last = (
            next(n for n, row in enumerate(rows) if name in row[:8])
            for name in ("config", "weights")
        )
        assert "architecture" in rows[first + 1] and last - first <= 6, done.output
        document = json.loads(run_phireg(*command, "--json").output)
        assert len(document["checks"][1]["problems"]) > 3


@pytest.mark.parametrize("package", ["modelopt", "compressed"])
def test_a_stale_shard_is_named(package, exported, sources, tmp_path):
    """One file of a model that was trained on, beside the others of the model before."""
    directory = copied(exported(package, "phi3", "fp8", "150KB"), tmp_path)
    stale = sorted(directory.glob("model-*.safetensors"))[2]
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(stale)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            order = torch.randperm(len(tensor), generator=generator)
            tensors[name] = tensor.view(torch.uint8)[order].view(tensor.dtype)
        elif tensor.dim() == 1 and len(tensor) > 1:
            tensors[name] = tensor.flip(0)
    save_file(tensors, stale, {"format": "pt"})
    problems = phireg.verify(directory, sources["phi3"], checks=QUICK).check("weights").problems
    assert len(problems) > 1
    assert all(stale.name in problem.hint for problem in problems)


@pytest.mark.parametrize("package", ["modelopt", "compressed"])
def test_exchanged_scales_of_the_cache_are_named(package, sources, tmp_path):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is missing")
    source = copied(sources["phi3"], tmp_path)
    for layer in range(3):  # values are smaller than keys, as in trained models
        name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
        change(source, name, lambda t: torch.cat((t[:160], t[160:] / 16)))
    directory = tmp_path / "q"
    exports.modelopt("phi3", source, "fp8", directory, dtype=torch.bfloat16, run=False)
    key, value = (f"{LAYER}self_attn.{part}_proj.{part}_scale" for part in "kv")
    if package == "compressed":
        key, value = as_compressed(directory)
    assert phireg.verify(directory, source, checks=("structure", "logits")).passed
    change(directory, key, lambda k, v: (v, k), value)
    result = phireg.verify(directory, source, checks=(*QUICK, "logits"))
    assert result.check("weights").verdict == "passed"
    named = [problem for problem in result.check("logits").problems if problem.where == key]
    assert [problem.layer for problem in named] == [1]
    assert len([p for p in result.check("logits").problems if "_scale" in p.where]) == 1


def as_compressed(directory):
    """Name the same tensors as compressed-tensors does; return the scales of layer 1's cache."""
    (directory / "hf_quant_config.json").unlink()
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": weights,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": weights}
        },
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "model.safetensors"
    tensors = {
        name.replace("k_proj.k_scale", "k_scale").replace("v_proj.v_scale", "v_scale"): tensor
        if tensor.dim()
        else tensor.bfloat16().reshape(1)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    return f"{LAYER}self_attn.k_scale", f"{LAYER}self_attn.v_scale"


def test_a_forgotten_factor_in_a_norm_is_named(exported, sources, tmp_path):
    """AWQ on phi-2 divides the weights behind a norm and multiplies the norm."""
    directory = copied(exported("modelopt", "phi2", "int4_awq"), tmp_path)
    source = load_file(sources["phi2"] / "model.safetensors")
    for part in ("weight", "bias"):
        name = f"{LAYER}input_layernorm.{part}"
        change(directory, name, lambda _, name=name: source[name])
    problems = phireg.verify(directory, sources["phi2"], checks=QUICK).check("weights").problems
    assert {problem.layer for problem in problems} == {1}
    assert any("divided" in problem.text for problem in problems)


def test_settings_that_differ_are_named(exported, sources, tmp_path):
    directory = copied(exported("modelopt", "phi3", "fp8"), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["rms_norm_eps"] = 1e-6
    config["rope_parameters"]["rope_theta"] = 7.0
    (directory / "config.json").write_text(json.dumps(config))
    result = phireg.verify(directory, sources["phi3"], checks=(*QUICK, "reading"))
    for check in ("config", "reading"):
        text = " ".join(problem.where for problem in result.check(check).problems)
        assert "norm_epsilon" in text
        assert "base" in text


def test_a_sidecar_that_disagrees_fails_the_structure(exported, sources, tmp_path):
    directory = copied(exported("modelopt", "phi3", "fp8"), tmp_path)
    path = directory / "hf_quant_config.json"
    document = json.loads(path.read_text())
    document["quantization"]["exclude_modules"].append("model.layers.0*")
    path.write_text(json.dumps(document))
    result = phireg.verify(directory, sources["phi3"], checks=QUICK)
    assert result.check("structure").verdict == "failed"
    assert result.verdict == "failed"
