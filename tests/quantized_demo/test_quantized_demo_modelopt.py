"""ModelOpt's fake-quantized model beside ours: same texts to calibrate on, same dtype."""

import pytest
import torch
from demo_script import script
from safetensors.torch import load_file

from phireg.executor import quantized

pytest.importorskip("modelopt.torch.quantization")

CASES = [("phi2", "fp8", "fp8"), ("phi3-mini", "int8_sq", None), ("phi3-medium", "fp8", None)]
MANY = 48
FEW = 3
NAMES = {
    "attention.dense": ("self_attn.dense", "self_attn.o_proj"),
    "mlp.fc": ("mlp.fc1", "mlp.gate_up_proj"),
    "mlp.proj": ("mlp.fc2", "mlp.down_proj"),
    "attention.qkv": ("self_attn.qkv_proj",),
}


def linears(model):
    """Layer, our name of a linear, and ModelOpt's modules whose outputs are its rows."""
    for number, layer in enumerate(model.model.layers):
        modules = dict(layer.named_modules())
        for name, theirs in NAMES.items():
            sources = [modules[path] for path in theirs if path in modules]
            yield number, name, sources or [modules[f"self_attn.{p}_proj"] for p in "qkv"]


def same_but_for_ties(ours, theirs, unrounded, scale, grid):
    """True if all that differs was half way between two values of the grid; and its share."""
    differ = (ours - theirs).abs() > 1e-5 * theirs.abs().max()
    levels = (unrounded / scale).double().abs()
    step = 1.0
    if grid == "fp8":
        step = 2.0 ** (levels.clamp(min=2.0**-6).log2().floor() - 3)
    half = ((levels / step).frac() - 0.5).abs() < 1e-5 * (1 + levels / step)
    return bool((half | ~differ).all()), float(differ.float().mean())


@pytest.mark.parametrize(
    ("family", "qformat"),
    [
        ("phi2", "fp8"),
        ("phi3-mini", "int8_sq"),
        pytest.param("phi3-medium", "fp8", marks=pytest.mark.slow),
    ],
)
def test_every_linear_is_the_same_arithmetic(measured, family, qformat, tmp_path):
    """Weights and inputs go to the same values of the grid, but for ties.

    ModelOpt multiplies by 448 / amax (or 127 / amax) where its exporter, and we, divide by the
    scale. A bfloat16 weight has so few bits that it often lies half way between two e4m3 values,
    and float32's rounding of the quotient decides.
    """
    demo = measured(family, FEW)
    model = script.modelopt_model(demo.model.directory, demo.calibration, qformat, None)
    script.use_exported_maxima(model, qformat, None)
    plan = script.phireg.plan(demo.model.directory, family=family, dtype="float32", qformat=qformat)
    script.phireg.quantize(plan, tmp_path / "c", demo.statistics)
    tensors = load_file(tmp_path / "c" / "rank0.safetensors")
    given = {}
    for number, name, modules in linears(model):
        modules[0].register_forward_hook(
            lambda _, inputs, __, key=(number, name): given.update({key: inputs[0]})
        )
    with torch.no_grad():
        model(torch.tensor([demo.rows[0]]), use_cache=False)
    grid = "fp8" if qformat == "fp8" else "int8"
    for number, name, modules in linears(model):
        prefix = f"transformer.layers.{number}.{name}."
        weights, inputs, smoother = (
            tensors.get(f"{prefix}{kind}_scaling_factor")
            for kind in ("weights", "activation", "prequant")
        )
        stored = torch.cat([module.weight for module in modules])  # smoothed, if there is smoothing
        theirs = torch.cat([module.weight_quantizer(module.weight) for module in modules])
        if name == "mlp.fc" and family != "phi2":  # ours has up before gate
            stored, theirs = (torch.cat(rows.chunk(2)[::-1]) for rows in (stored, theirs))
        ours = tensors[f"{prefix}weight"].float() * weights[:, None]
        same, share = same_but_for_ties(ours, theirs, stored, weights[:, None], grid)
        assert same, (number, name)
        assert share < 0.02

        x = given[number, name]
        theirs = modules[0].input_quantizer(x)
        if smoother is not None:
            x = x * smoother
        ours = quantized.fake_quantize(x, inputs, grid)
        same, share = same_but_for_ties(ours, theirs, x, inputs, grid)
        assert same, (number, name)
        assert share < 1e-3


def check(measured, family, qformat, cache, rows, perplexity, top1):
    demo = measured(family, rows)
    ours = demo.quantized(qformat, cache, dtype="float32")
    own, theirs = demo.modelopt(qformat, cache)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=perplexity)
    assert ours.agreement(theirs) > top1
    assert ours.perplexity == pytest.approx(own.perplexity, rel=2 * perplexity)


@pytest.mark.parametrize(
    ("family", "qformat", "cache"), [("phi2", "fp8", None), ("phi3-mini", "int8_sq", "int8")]
)
def test_perplexity_on_some_texts(measured, family, qformat, cache):
    check(measured, family, qformat, cache, FEW, 5e-3, 0.97)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "qformat", "cache"), CASES)
def test_perplexity_on_many_texts(measured, family, qformat, cache):
    """A third of the split; the figures in docs/quantize.md are of all of it."""
    check(measured, family, qformat, cache, MANY, 1e-3, 0.985)
