"""Quantized checkpoints: correct ones pass, mistakes are located, exporters' ways are noted."""

import shutil

import pytest
import torch
from planted import L1, config, each, ranks
from planted_quantized import CACHE, FC, INPUT, PLANTED, QKV, SCALE, SMOOTH
from safetensors.torch import load_file
from verify_sources import FAMILIES, converted, edit_config, quantized, source

import phireg
from phireg.report.verification import render_verification as render
from phireg.verification.result import CHECKS, QUICK

FORMATS = [
    ("fp8", None), ("fp8", "fp8"), ("int8_sq", None), ("int8_sq", "int8"), ("int8_wo", "int8")
]  # fmt: skip


def copied(to, *form):
    return shutil.copytree(quantized(*form), to)


def verify(directory, family, checks=QUICK):
    return phireg.verify(directory, source(family), family=family, checks=checks)


def texts(verification):
    return "\n".join(str(problem) for check in verification.checks for problem in check.problems)


@pytest.mark.parametrize(
    ("family", "qformat", "cache", "tp_size"),
    [
        *((family, *form, 2) for family in FAMILIES for form in FORMATS),
        *(("phi3-small", *form, 1) for form in FORMATS),
    ],
)
def test_a_correct_quantized_checkpoint_passes(family, qformat, cache, tp_size):
    verification = verify(quantized(family, qformat, cache, tp_size), family, tuple(CHECKS))
    assert verification.passed, texts(verification)
    assert verification.verdict == "verified"
    assert "quantized" in verification.check("logits").summary
    assert verification.logits.quantized
    places = dict(verification.logits.places)
    for end in ("embedding", "final norm", "lm_head"):
        assert places[None, end] <= verification.logits.tolerance  # not quantized
    assert verification.check("ranks").verdict == ("not needed" if tp_size == 1 else "passed")
    assert "quantized" in render(verification)


@pytest.mark.parametrize(
    ("qformat", "dtype", "alpha"),
    [
        *(
            (qformat, dtype, 1.0)
            for qformat in ("fp8", "int8_sq")
            for dtype in ("bfloat16", "float32")
        ),
        ("int8_sq", "float16", 0.5),
    ],
)  # fmt: skip
def test_other_dtypes_and_another_alpha(qformat, dtype, alpha):
    verification = verify(quantized("phi3-medium", qformat, None, 2, dtype, alpha), "phi3-medium")
    assert verification.passed, texts(verification)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_where_it_is(name, tmp_path):
    planted = PLANTED[name]
    directory = copied(tmp_path / "c", planted.family, planted.qformat, planted.cache, planted.tp)
    planted.damage(directory, planted.family)
    verification = verify(directory, planted.family, ("structure", "config", "weights"))
    problems = [p for check in verification.checks for p in check.problems]
    named = [problem.where.split(" ")[-1] for problem in problems]
    assert set(named) == set(planted.where)
    text = next(p.text for p in problems if p.where.endswith(planted.where[0]))
    assert planted.says in text
    layers = {problem.layer for problem in verification.check("weights").problems}
    assert layers == {1}


@pytest.mark.parametrize("name", [name for name, planted in PLANTED.items() if planted.logits])
def test_logits_alone_show_gross_mistakes(name, tmp_path):
    planted = PLANTED[name]
    directory = copied(tmp_path / "c", planted.family, planted.qformat, planted.cache, planted.tp)
    planted.damage(directory, planted.family)
    verification = verify(directory, planted.family, ("logits",))
    part = "attention" if "attention" in planted.where[0] else "mlp"
    assert verification.logits.wrong_places == ((1, part),)


@pytest.mark.parametrize(
    ("name", "qformat", "value", "says"),
    [
        (FC + SCALE, "int8_sq", 0.0, "0"), (QKV + INPUT, "fp8", -1.0, "-1"),
        (QKV + SMOOTH, "int8_sq", torch.inf, "inf"),
        (QKV + SMOOTH, "int8_sq", 1e-40, "1.19209e-07"), (FC + SCALE, "fp8", 1e-40, "9.99995e-41"),
        (CACHE, "fp8", torch.nan, "nan"),
    ],
)  # fmt: skip
def test_scales_that_are_none_are_structure(name, qformat, value, says, tmp_path):
    directory = copied(tmp_path / "c", "phi2", qformat, "fp8" if qformat == "fp8" else None, 2)

    def change(x):
        x = x.clone()
        x[0] = value if x.dtype == torch.float32 or value != 1e-40 else 1e-7
        return x

    each(name, change, only=(1,))(directory, "phi2")
    (problem,) = verify(directory, "phi2", ("structure",)).check("structure").problems
    assert problem.where == f"rank1.safetensors: {name}"
    assert f"{says} is not a finite" in problem.text
    assert problem.layer == 1
    assert not verify(directory, "phi2").passed


def test_how_exporters_write_it_is_noted(tmp_path):
    """e4m3 as int8, scalars, scales of keys and values, other lists of excluded modules."""
    directory = copied(tmp_path / "c", "phi3-mini", "fp8", "fp8", 1)
    (directory / "phireg.json").unlink()

    def rewrite(loaded, family):
        (tensors,) = loaded
        for name in list(tensors):
            if tensors[name].dtype == torch.float8_e4m3fn:
                tensors[name] = tensors[name].view(torch.int8)
            elif name.endswith("activation_scaling_factor"):
                tensors[name] = tensors[name][0]
            elif "kv_cache" in name:
                for part in ("k_cache", "v_cache"):
                    tensors[name.replace("kv_cache", part)] = tensors[name].clone()

    ranks(rewrite)(directory, "phi3-mini")
    edit_config(directory, lambda c: c["quantization"].pop("exclude_modules"))
    verification = verify(directory, "phi3-mini", tuple(CHECKS))
    assert verification.passed, texts(verification)
    notes = "\n".join(note for check in verification.checks for note in check.notes)
    assert "as early exporters wrote it" in notes
    assert "exclude_modules is absent" in notes
    edit_config(directory, lambda c: c["quantization"].update(exclude_modules=["lm_head"]))
    verification = verify(directory, "phi3-mini")
    assert verification.passed
    assert "another list; the same modules" in "\n".join(verification.check("config").notes)

    each(L1 + "attention.v_cache_scaling_factor", lambda x: x * 2)(directory, "phi3-mini")
    verification = verify(directory, "phi3-mini")
    assert "it must be the larger one" in texts(verification)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"exclude_modules": ["*mlp.fc", "lm_head"]}, "leaves out transformer.layers.0.mlp.fc"),
        ({"exclude_modules": ["*vocab_embedding"]}, "does not leave out lm_head"),
        ({"exclude_modules": "lm_head"}, "exclude_modules: is 'lm_head'"),
        ({"kv_cache_quant_algo": "FP4"}, "kv_cache_quant_algo: is 'FP4'"),
        ({"quant_algo": "FP8_BLOCK_SCALES"}, "quant_algo: is 'FP8_BLOCK_SCALES'"),
        ({"kv_cache_quant_algo": None}, "kv_cache_scaling_factor"),
    ],
)
def test_the_quantization_section(change, says, tmp_path):
    directory = copied(tmp_path / "c", "phi3-mini", "fp8", "fp8", 1)
    edit_config(directory, lambda c: c["quantization"].update(change))
    verification = verify(directory, "phi3-mini")
    assert not verification.passed
    assert says in texts(verification)


def test_an_unknown_algorithm_is_not_called_damage(tmp_path):
    directory = copied(tmp_path / "c", "phi3-mini", "fp8", None, 1)
    edit_config(directory, lambda c: c["quantization"].update(quant_algo="FP8_BLOCK_SCALES"))
    verification = verify(directory, "phi3-mini")
    assert verification.check("weights").verdict == "skipped"
    assert "FP8_BLOCK_SCALES" in verification.check("weights").summary


def test_a_quantized_kv_cache_alone(tmp_path):
    directory = shutil.copytree(converted("phi3-mini", 2), tmp_path / "c")
    edit_config(directory, lambda c: c["quantization"].update(kv_cache_quant_algo="INT8"))

    def scales(loaded, family):
        for tensors in loaded:
            for layer in range(3):
                name = f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"
                tensors[name] = torch.tensor([0.1])

    ranks(scales)(directory, "phi3-mini")
    verification = verify(directory, "phi3-mini", tuple(CHECKS))
    assert verification.passed, texts(verification)
    assert "only the KV cache is quantized" in "\n".join(verification.check("config").notes)
    assert verification.logits.quantized == ("attention",)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_legacy_noise_of_qkv_passes(dtype, tmp_path):
    """Exporters up to modelopt 0.21 average q's, k's and v's smoothing vectors in 16 bits."""
    directory = copied(tmp_path / "c", "phi3-medium", "int8_sq", None, 1, dtype)
    (directory / "phireg.json").unlink()
    weights = load_file(source("phi3-medium") / "model.safetensors")

    def rewrite(loaded, family):
        (tensors,) = loaded
        for layer in range(3):
            name = f"transformer.layers.{layer}.attention.qkv"
            given = tensors[name + SMOOTH]
            average = (given + given + given) / 3
            weight = weights[f"model.layers.{layer}.self_attn.qkv_proj.weight"].to(given.dtype)
            smoothed = (weight.float() / given.float()).to(given.dtype) * given / average
            scale = smoothed.float().abs().amax(1) / 127
            tensors[name + SMOOTH] = average
            tensors[name + SCALE] = scale
            tensors[name + ".weight"] = (smoothed.float() / scale[:, None]).round().to(torch.int8)

    ranks(rewrite)(directory, "phi3-medium")
    verification = verify(directory, "phi3-medium")
    assert verification.passed, texts(verification)


def test_an_activation_scale_far_off_is_noted(tmp_path):
    """FP8 hardly minds a scale that is too large; one that is too small cuts inputs off."""
    directory = copied(tmp_path / "c", "phi2", "fp8", None, 2)
    each(FC + INPUT, lambda x: x / 8)(directory, "phi2")
    verification = verify(directory, "phi2", ("logits",))
    (note,) = [n for n in verification.check("logits").notes if "cut off" in n]
    assert "layer 1 mlp.fc" in note


@pytest.mark.parametrize(
    ("family", "change", "part"),
    [
        ("phi3-medium", {"rotary_base": 50.0}, "attention"),
        ("phi2", {"rotary_pct": 1.0}, "attention"),
        ("phi3-small", {"mup_embedding_multiplier": 1.0}, "embedding"),
        ("phi3-small", {"dense_attention_every_n_layers": 1}, "attention"),
    ],
)
def test_logits_show_a_wrong_config_of_a_quantized_checkpoint(family, change, part, tmp_path):
    directory = copied(tmp_path / "c", family, "fp8", None, 1)
    config(**change)(directory, family)
    verification = verify(directory, family, ("logits",))
    assert not verification.passed
    assert verification.logits.wrong_places[0][1] == part
