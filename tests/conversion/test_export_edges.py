"""Quantized checkpoints of values at the edges, and what is refused."""

import numpy as np
import pytest
import torch
from export_cases import files, formats, plan_of, ranks
from helpers.by_hand import (
    calibration,
    model,
    write_model,
)
from helpers.plan_sources import LAYERS

import phireg
from phireg.calibration.statistics import Statistics
from phireg.conversion import quantizer as quantizing
from phireg.conversion.scales import check_scales, compute_scales
from phireg.errors import PlanError, UsageError

DOWN = "model.layers.1.mlp.down_proj"
PROJ = "transformer.layers.1.mlp.proj"


def export(tmp_path, qformat, tensors, statistics, alpha=1.0):
    source = write_model(tmp_path / "hf", "mini", tensors)
    plan = plan_of(source, "mini", qformat)
    done = phireg.quantize(plan, tmp_path / "out", statistics, alpha=alpha)
    return done, ranks(tmp_path / "out", 1)[0]


def test_zero_weights_have_scale_one(tmp_path):
    tensors = model("mini")
    tensors[f"{DOWN}.weight"].zero_()
    _, quantized = export(tmp_path / "fp8", "fp8", tensors, calibration("mini"))
    assert quantized[f"{PROJ}.weights_scaling_factor"].tolist() == [1.0]
    assert not quantized[f"{PROJ}.weight"].float().any()
    tensors = model("mini")
    tensors[f"{DOWN}.weight"][5] = 0
    _, quantized = export(tmp_path / "int8_sq", "int8_sq", tensors, calibration("mini"))
    scales = quantized[f"{PROJ}.weights_scaling_factor"]
    assert scales[5] == 1 and (scales == 1).sum() == 1
    assert not quantized[f"{PROJ}.weight"][5].any()


@pytest.mark.parametrize(
    ("amax", "alpha", "smoother"),
    # at 0.5 a channel of zero weights has none to share the range with
    [(0, 1.0, 1e4), (0, 0.5, 1e4), (3e4, 1.0, 1e-4), (1, 0.5, 1e-4)],
)
def test_smoothers_end_at_their_bounds(tmp_path, amax, alpha, smoother):
    tensors, statistics = model("mini"), calibration("mini")
    statistics.inputs[DOWN][3] = amax
    tensors[f"{DOWN}.weight"][:, 3] = 0  # W / s must fit
    _, quantized = export(tmp_path, "int8_sq", tensors, statistics, alpha)
    prequant = quantized[f"{PROJ}.prequant_scaling_factor"][3]
    assert prequant == torch.tensor(smoother, dtype=torch.float16)
    if amax == 3e4:
        scale = quantized[f"{PROJ}.activation_scaling_factor"].item()
        assert scale == pytest.approx(3 / 127, 1e-3)


def test_unquantized_weights_still_lose_what_a_cast_loses(tmp_path):
    tensors = model("mini")
    tensors["model.norm.weight"][:2] = 1e-9
    done, _ = export(tmp_path, "fp8", tensors, calibration("mini"))
    assert set(done.losses) == {"model.norm.weight"}
    assert done.losses["model.norm.weight"].flushed == 2


def refused(tmp_path, qformat, tensors, statistics, dtype="float16", cache=None, alpha=1.0):
    source = write_model(tmp_path / "hf", "mini", tensors)
    plan = plan_of(source, "mini", qformat, dtype=dtype, cache=cache)
    with pytest.raises(PlanError) as caught:
        phireg.quantize(plan, tmp_path / "out", statistics, alpha=alpha)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert "nothing was written" in caught.value.message
    return caught.value.message.splitlines()[1:]


@formats
def test_weights_that_are_not_numbers(tmp_path, qformat, alpha):
    tensors = model("mini")
    tensors[f"{DOWN}.weight"][2, 7] = float("nan")
    text = "\n".join(refused(tmp_path, qformat, tensors, calibration("mini"), alpha=alpha))
    name = DOWN if qformat == "int8_sq" else PROJ
    assert f"{name}.weights_scaling_factor: " in text and "is not a number" in text
    assert "layers.0" not in text and "layers.2" not in text


@formats
def test_weights_that_do_not_fit_the_dtype(tmp_path, qformat, alpha):
    tensors = model("mini")
    for i in (0, 2):
        tensors[f"model.layers.{i}.self_attn.o_proj.weight"][2, 6:8] = 1e6
    text = "\n".join(refused(tmp_path, qformat, tensors, calibration("mini"), alpha=alpha))
    name = "model.layers.{0,2}.self_attn.o_proj.weight"
    assert f"{name}: 2 finite values do not fit into float16  (2 of them)" in text
    assert "infinite" in text


def test_scales_out_of_range(tmp_path):
    tensors, statistics = model("mini"), calibration("mini")
    statistics.inputs[DOWN][3] = 5e3
    tensors[f"{DOWN}.weight"][1, 3] = 100.0
    (line,) = refused(tmp_path / "infinite", "int8_sq", tensors, statistics)
    assert f"{DOWN}.weights_scaling_factor: is infinite (1 of 24 values)" in line
    tensors[f"{DOWN}.weight"].fill_(1e-37)
    statistics.inputs[DOWN][:] = 1
    for qformat, owner in (("fp8", PROJ), ("int8_sq", DOWN)):
        (line,) = refused(tmp_path / qformat, qformat, tensors, statistics, "bfloat16")
        assert f"{owner}.weights_scaling_factor: is denormal" in line


@formats
def test_a_layer_that_is_switched_off_has_scale_one_and_a_warning(tmp_path, qformat, alpha):
    statistics = calibration("mini")
    for i in (0, 2):
        statistics.inputs[f"model.layers.{i}.self_attn.o_proj"][:] = 0
    done, quantized = export(tmp_path, qformat, model("mini"), statistics, alpha)
    off = [f"transformer.layers.{i}.attention.dense" for i in (0, 2)]
    assert [(found.code, found.subject) for found in done.findings] == [
        ("unseen", name) for name in off
    ]
    scales = {n: v for n, v in quantized.items() if n.endswith("activation_scaling_factor")}
    assert {n.rpartition(".")[0] for n, v in scales.items() if v == 1} == set(off)
    if qformat == "int8_sq":
        assert (quantized[f"{off[0]}.prequant_scaling_factor"] == 1).all()
    # its weight is quantized as any other: it may be switched on by what calibration did not see
    source = model("mini")["model.layers.0.self_attn.o_proj.weight"].half().float()
    scale = quantized[f"{off[0]}.weights_scaling_factor"].reshape(-1, 1)
    assert (
        quantized[f"{off[0]}.weight"].float() * scale - source
    ).abs().max() < 0.07 * source.max()
    checks = ("structure", "config", "weights")
    assert (
        phireg.verify(tmp_path / "out", tmp_path / "hf", checks=checks).check("weights").verdict
        == "passed"
    )


def test_a_cache_that_is_always_empty(tmp_path):
    statistics = calibration("mini")
    zero = Statistics(statistics.inputs, (1.0, 0.0, 1.0), (1.0, 0.0, 1.0), {})
    source = write_model(tmp_path / "hf", "mini", model("mini"))
    plan = plan_of(source, "mini", "int8_wo", cache="int8")
    done = phireg.quantize(plan, tmp_path / "out", zero)
    assert [found.subject for found in done.findings] == ["transformer.layers.1.attention"]
    name = "transformer.layers.{}.attention.kv_cache_scaling_factor"
    stored = ranks(tmp_path / "out", 1)[0]
    assert [float(stored[name.format(i)]) == 1 for i in range(LAYERS)] == [False, True, False]


def test_all_gaps_of_the_statistics_are_named(tmp_path):
    statistics = calibration("mini")
    inputs = dict(statistics.inputs)
    for i in range(LAYERS):
        del inputs[f"model.layers.{i}.self_attn.qkv_proj"]
    inputs[DOWN] = np.ones(19, np.float32)
    gaps = Statistics(inputs, (), (), {})
    lines = refused(tmp_path / "none", "fp8", model("mini"), gaps, cache="fp8")
    assert [line.split()[1] for line in lines] == [
        "model.layers.{0..2}.self_attn.qkv_proj:", f"{DOWN}:", "KV",
    ]  # fmt: skip
    short = Statistics(statistics.inputs, statistics.keys[:2], statistics.values[:2], {})
    (line,) = refused(tmp_path / "short", "int8_wo", model("mini"), short, cache="fp8")
    assert "2 layers, the model has 3" in line


def test_a_missing_or_negative_scale_is_refused(tmp_path):
    source = write_model(tmp_path / "hf", "mini", model("mini"))
    plan = plan_of(source, "mini", "int8_sq")
    values = dict(compute_scales(plan, calibration("mini")).values)
    check_scales(plan, values)
    missing = values.pop(f"{PROJ}.prequant_scaling_factor")
    values[f"{DOWN}.weights_scaling_factor"] = np.full(24, -1, np.float32).view(np.uint32)
    with pytest.raises(PlanError) as caught:
        check_scales(plan, values)
    assert f"{PROJ}.prequant_scaling_factor: is missing" in caught.value.message
    assert f"{DOWN}.weights_scaling_factor: is negative (24 of 24 values)" in caught.value.message
    assert missing.dtype == np.uint16


def test_requests_that_make_no_sense(tmp_path):
    source = write_model(tmp_path / "hf", "mini", model("mini"))
    fp8, statistics = plan_of(source, "mini", "fp8"), calibration("mini")
    smoothquant = plan_of(source, "mini", "int8_sq")
    plain = phireg.plan(source, family="phi3-mini")
    weights = plan_of(source, "mini", "int8_wo")
    for plan, given, alpha in (
        (plain, statistics, 1.0),
        (fp8, statistics, 0.5),
        (smoothquant, statistics, 1.5),
        (smoothquant, statistics, float("nan")),
        (weights, "amax", 1.0),
    ):
        with pytest.raises(UsageError):
            phireg.quantize(plan, tmp_path / "out", given, alpha=alpha)
    for plan in (fp8, plan_of(source, "mini", "int8_wo", cache="int8")):
        with pytest.raises(UsageError) as caught:
            phireg.convert(plan, tmp_path / "out")
        assert "phireg quantize" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("qformat", ["int8_wo", "int4_wo"])
def test_weight_only_needs_no_statistics(tmp_path, qformat):
    source = write_model(tmp_path / "hf", "mini", model("mini"))
    phireg.quantize(plan_of(source, "mini", qformat, 2), tmp_path / "quantized", None)
    phireg.convert(plan_of(source, "mini", qformat, 2), tmp_path / "converted")
    assert files(tmp_path / "quantized") == files(tmp_path / "converted")


# --- the arithmetic of a block ----------------------------------------------------------------


def test_what_lies_beyond_the_grid_is_cut_off_and_counted():
    weight = np.array([[463, -463.9, 464, -1e30, 1]], np.float32)
    levels, saturated = quantizing.to_e4m3(weight.view(np.uint32), "F32", np.float32(1))
    values = torch.from_numpy(levels).view(torch.float8_e4m3fn).float()
    assert values.tolist() == [[448, -448, 448, -448, 1]] and saturated == 2
    row = np.array([[127.4, -128.4, 127.6, -129, 1, 0.5, 1.5]], np.float32)
    ones = np.ones(7, np.float32)
    levels, saturated = quantizing.to_int8(row.view(np.uint32), "F32", ones, ones[:1])
    assert levels.view(np.int8).tolist() == [[127, -128, 127, -128, 1, 0, 2]] and saturated == 2


def test_e4m3_is_rounded_once_to_nearest_even():
    """Against all 127 magnitudes of the format, from an exact description of it."""
    grid = np.array(
        [m / 8 * 2.0**-6 for m in range(8)]
        + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    )
    middles = (grid[1:] + grid[:-1]) / 2  # exact in float32
    values = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9)])
    values = np.concatenate([grid, values.astype(np.float32)]).astype(np.float32)
    expected = [min(range(127), key=lambda i: (abs(grid[i] - v), i % 2)) for v in values.tolist()]
    levels, _ = quantizing.to_e4m3(values[None].view(np.uint32), "F32", np.float32(1))
    assert levels[0].tolist() == expected
