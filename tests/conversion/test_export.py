"""Quantized checkpoints, tensor for tensor against arithmetic by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from export_cases import files, formats, models, plan_of, ranks
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

import phireg
from phireg.calibration.settings import Settings
from phireg.calibration.statistics import Statistics
from phireg.checkpoint.manifest import read_manifest
from phireg.conversion import quantizer as quantizing
from phireg.conversion import scales as scaling
from phireg.conversion import stream as streaming
from phireg.conversion.scales import compute_scales
from phireg.dtypes import torch_dtype
from phireg.testing import write_random_model

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
