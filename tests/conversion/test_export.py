"""Quantized checkpoints, tensor for tensor against arithmetic by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers.by_hand import (
    DTYPES,
    FAMILY_OF,
    KV_HEADS,
    SOURCES,
    calibration,
    model,
    rank,
    row_order,
    same,
    whole,
    write_model,
)
from helpers.memory import measure
from helpers.plan_sources import LAYERS, MODELS
from phireg_plugins.phi3_mini import FAMILY
from safetensors.torch import load_file

import phireg
from phireg.calibration.settings import Settings
from phireg.calibration.statistics import Statistics
from phireg.checkpoint.manifest import read_manifest
from phireg.conversion import quantizer as quantizing
from phireg.conversion import scales as scaling
from phireg.conversion import stream as streaming
from phireg.conversion.scales import check_scales, compute_scales
from phireg.dtypes import torch_dtype
from phireg.errors import PlanError, UsageError
from phireg.testing import write_random_model

FORMATS = [("fp8", 1.0), ("int8_sq", 1.0), ("int8_sq", 0.5)]
formats = pytest.mark.parametrize(("qformat", "alpha"), FORMATS)
models = pytest.mark.parametrize("key", list(KV_HEADS))


def plan_of(source, key, qformat, tp=1, dtype="float16", cache=None):
    plan = phireg.plan(
        source,
        family=MODELS[key][0],
        qformat=qformat,
        kv_cache_dtype=cache,
        tp_size=tp,
        dtype=dtype,
    )
    assert not plan.errors
    return plan


def ranks(directory, tp):
    return [load_file(directory / f"rank{index}.safetensors") for index in range(tp)]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- every linear of every family -------------------------------------------------------------


@formats
@pytest.mark.parametrize(
    ("key", "stored", "dtype", "tp"),
    [
        *((key, "float32", "float16", tp) for key in KV_HEADS for tp in (1, 2, 4)),
        *((key, "float32", "bfloat16", 2) for key in ("phi2", "small")),
        *((key, "float32", "float32", 2) for key in ("phi2", "small")),
        *((key, "bfloat16", "float16", 2) for key in ("phi2", "small")),
    ],
)
def test_every_rank_holds_what_hand_computes(tmp_path, key, qformat, alpha, stored, dtype, tp):
    """Weights are quantized in the checkpoint's dtype."""
    tensors, statistics = model(key, DTYPES[stored]), calibration(key)
    source = write_model(tmp_path / "hf", key, tensors)
    plan = plan_of(source, key, qformat, tp, dtype)
    phireg.quantize(plan, tmp_path / "out", statistics, alpha=alpha)
    linears = whole(key, tensors, statistics, qformat, dtype, alpha)
    assert len(linears) == 4 * LAYERS
    plain = phireg.plan(source, family=MODELS[key][0], tp_size=tp, dtype=dtype)
    phireg.convert(plain, tmp_path / "plain")
    for index, (quantized, raw) in enumerate(
        zip(ranks(tmp_path / "out", tp), ranks(tmp_path / "plain", tp), strict=True)
    ):
        expected = rank(key, linears, tp, index)
        expected |= {name: tensor for name, tensor in raw.items() if name not in expected}
        assert quantized.keys() == expected.keys()
        assert [name for name in quantized if not same(quantized[name], expected[name])] == []


@pytest.mark.parametrize("cache", ["fp8", "int8"])
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int8_wo", "int4_wo"])
def test_kv_cache_scales(tmp_path, qformat, cache):
    inputs = calibration("medium").inputs
    statistics = Statistics(inputs, (500.25, 100.0, 30.0), (99.0, 901.1, 20.0), {})
    source = write_model(tmp_path / "hf", "medium", model("medium"))
    plan = plan_of(source, "medium", qformat, 4, cache=cache)
    phireg.quantize(plan, tmp_path / "out", statistics)
    for quantized in ranks(tmp_path / "out", 4):
        for i in range(LAYERS):
            amax = np.float32((500.25, 901.1, 30.0)[i])
            scale = amax / np.float32(127 if cache == "int8" else 448)
            if cache == "fp8" and i == 2:
                scale = 1.0
            tensor = quantized[f"transformer.layers.{i}.attention.kv_cache_scaling_factor"]
            assert same(tensor, torch.tensor([scale], dtype=torch.float32))
    small = Statistics(statistics.inputs, (0.5,) * LAYERS, (0.25,) * LAYERS, {})
    phireg.quantize(plan, tmp_path / "small", small)
    quantized = ranks(tmp_path / "small", 4)[3][
        "transformer.layers.0.attention.kv_cache_scaling_factor"
    ]
    assert quantized.item() == (1 if cache == "fp8" else np.float32(0.5) / np.float32(127))


@models
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
def test_converting_and_dequantizing_commute(tmp_path, key, qformat, tp):
    """A source that holds the dequantized weights, converted, is the checkpoint dequantized."""
    tensors, statistics = model(key), calibration(key)
    source = write_model(tmp_path / "hf", key, tensors)
    plan = plan_of(source, key, qformat, tp, "float32")
    phireg.quantize(plan, tmp_path / "out", statistics)
    linears = whole(key, tensors, statistics, qformat, "float32")

    def dequantized(linear):
        scale = linear["weights_scaling_factor"]
        weight = linear["weight"].float() * (scale if scale.shape == (1,) else scale[:, None])
        return weight * linear.get("prequant_scaling_factor", torch.ones(()))

    for target, linear in linears.items():
        _, _, layer, name = target.split(".", 3)
        weight = dequantized(linear)
        back = torch.empty_like(weight)
        back[row_order(key, name, len(weight))] = weight
        modules = SOURCES[FAMILY_OF[key]][name]
        names = [f"model.layers.{layer}.{module}.weight" for module in modules]
        pieces = back.split([len(tensors[name]) for name in names])
        tensors |= {n: piece.contiguous() for n, piece in zip(names, pieces, strict=True)}
    other = write_model(tmp_path / "dequantized", key, tensors)
    plain = phireg.plan(other, family=MODELS[key][0], tp_size=tp, dtype="float32")
    phireg.convert(plain, tmp_path / "plain")
    for quantized, expected in zip(
        ranks(tmp_path / "out", tp), ranks(tmp_path / "plain", tp), strict=True
    ):
        for target in linears:
            mine = {
                companion: quantized[f"{target}.{companion}"]
                for companion in linears[target]
            }  # fmt: skip
            assert same(dequantized(mine), expected[f"{target}.weight"]), target


# --- nothing depends on how the work is cut up ------------------------------------------------


@formats
@pytest.mark.parametrize("key", ["phi2", "small"])
def test_blocks_pieces_and_workers_do_not_matter(tmp_path, monkeypatch, key, qformat, alpha):
    source = write_model(tmp_path / "hf", key, model(key))
    plan, statistics = plan_of(source, key, qformat, 2, cache="int8"), calibration(key)
    phireg.quantize(plan, tmp_path / "one", statistics, alpha=alpha)
    phireg.quantize(plan, tmp_path / "again", statistics, alpha=alpha)
    assert files(tmp_path / "one") == files(tmp_path / "again")
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 300)  # rows have 96 or 80 bytes
    monkeypatch.setattr(quantizing, "PIECE", 50)
    monkeypatch.setattr(streaming.stream, "__kwdefaults__", {
        **streaming.stream.__kwdefaults__, "workers": 7,
    })  # fmt: skip
    monkeypatch.setattr(compute_scales, "__kwdefaults__", {
        **compute_scales.__kwdefaults__, "workers": 7,
    })  # fmt: skip
    phireg.quantize(plan, tmp_path / "two", statistics, alpha=alpha)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@formats
def test_progress_counts_all_the_work(tmp_path, qformat, alpha):
    source = write_model(tmp_path / "hf", "medium", model("medium"))
    plan, done = plan_of(source, "medium", qformat, 2), Counter()
    totals = set()

    def progress(stage, more, total):
        done[stage] += more
        totals.add((stage, total))

    statistics = calibration("medium")
    phireg.quantize(plan, tmp_path / "out", statistics, alpha=alpha, progress=progress)
    weights = 4 * LAYERS * (24 * 48 + 24 * 24 + 40 * 24 + 24 * 20)
    assert done == {"scales": weights * (1 + (alpha < 1)), "writing": plan.tensor_bytes}
    assert totals == set(done.items())


@formats
def test_the_checkpoint_is_complete_and_says_where_it_comes_from(tmp_path, qformat, alpha):
    source = write_model(tmp_path / "hf", "small", model("small"))
    plan, statistics = plan_of(source, "small", qformat, 2, cache="fp8"), calibration("small")
    done = phireg.quantize(plan, tmp_path / "out", statistics, alpha=alpha)
    assert done.losses == {}  # above all, nothing saturated
    inspected = phireg.inspect(tmp_path / "out", check=True)
    assert inspected.problems == ()
    assert inspected.config["quantization"] == {
        "quant_algo": {"fp8": "FP8", "int8_sq": "W8A8_SQ_PER_CHANNEL"}[qformat],
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head", "*vocab_embedding"],
    }
    manifest = read_manifest(tmp_path / "out")
    assert manifest["options"] == {
        "dtype": "float16",
        "tp_size": 2,
        "moe_ep_size": 1,
        "weight_only": None,
        "qformat": qformat,
        "kv_cache_dtype": "fp8",
        "readings": {"weights": None, "adapter": None, "tie": None},
        "target": "trtllm",
        "max_shard_size": 5 * 10**9,
        "exclude": [],
        "quantize_lm_head": False,
        "form": None,
    }
    recorded = manifest["quantization"]
    assert recorded["alpha"] == (alpha if qformat == "int8_sq" else None)
    assert recorded["statistics"]["provenance"] == {"seed": 1}
    digest = recorded["statistics"]["digest"]
    assert digest == scaling.statistics_digest(calibration("small"))
    assert digest != scaling.statistics_digest(calibration("small", seed=2))


# --- values at the edges ----------------------------------------------------------------------

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


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@on_gpu
@formats
@pytest.mark.parametrize("key", ["phi2", "small"])
def test_a_gpu_writes_the_same_bytes(tmp_path, key, qformat, alpha):
    source = write_model(tmp_path / "hf", key, model(key))
    plan, statistics = plan_of(source, key, qformat, 2), calibration(key)
    for device in ("cpu", "cuda"):
        settings = Settings(device=device)
        phireg.quantize(plan, tmp_path / device, statistics, settings=settings, alpha=alpha)
    assert files(tmp_path / "cpu") == files(tmp_path / "cuda")


@on_gpu
@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_a_gpu_quantizes_to_the_same_bits(code):
    """Division by a scale, not multiplication by its reciprocal, and one rounding."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 4096, generator=generator).to(torch_dtype(code))
    block = weight.view(torch.uint16 if weight.itemsize == 2 else torch.uint32).numpy()
    scales = torch.rand(512, generator=generator).numpy() / 400 + np.float32(0.003)
    inverse = torch.rand(4096, generator=generator).numpy()
    for quantize, arguments in (
        (quantizing.to_e4m3, (scales[0],)),
        (quantizing.to_int8, (inverse, scales)),
    ):
        ours, lost = quantize(block, code, *arguments, "cpu")
        theirs, beyond = quantize(block, code, *arguments, "cuda")
        assert np.array_equal(ours, theirs) and lost == beyond > 0


# --- memory -----------------------------------------------------------------------------------

EXPORT = """
import json, sys
import numpy as np
import torch
import phireg
from phireg.calibration.statistics import Statistics
from phireg.conversion import quantizer

source, qformat, alpha = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
plan = phireg.plan(source, family="phi3-mini", qformat=qformat, tp_size=2)
statistics = Statistics(
    {m: np.ones(x.columns, np.float32) for x in plan.linears for m in x.sources}, (), (), {}
)
block = np.full((64, 64), 0x3F80, np.uint16)  # torch's own buffers, once
quantizer.to_e4m3(block, "BF16", np.float32(1))
quantizer.to_int8(block, "BF16", np.ones(64, np.float32), np.ones(64, np.float32))
before = resident("VmRSS")
phireg.quantize(plan, source.parent / "out", statistics, alpha=alpha)
print(json.dumps([plan.bytes_in, resident("VmHWM") - before,
                  plan.buffer_bytes(2)]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    config = {
        **MODELS["mini"][1],
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2},
        **{"num_attention_heads": 32, "vocab_size": 1000, "torch_dtype": "bfloat16"},
    }
    directory = tmp_path_factory.mktemp("large") / "hf"
    write_random_model(FAMILY, config, directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("qformat", "alpha"), [("fp8", 1.0), ("int8_sq", 0.5)])
def test_memory_does_not_grow_with_the_model(large, tmp_path, qformat, alpha):
    (tmp_path / "hf").symlink_to(large)
    size, grown, promised = measure(EXPORT, tmp_path / "hf", qformat, alpha)
    assert size > 260 * 2**20
    # What the allocator and the threads' stacks keep is not in buffers.
    assert grown < promised + 32 * 2**20 < size / 6
