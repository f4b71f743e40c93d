"""``plan``, ``explain`` and ``families`` on quantization, against the files that are written."""

import json
from functools import partial

import pytest
from helpers import exports
from helpers.damage import config
from helpers.tiny_phi3 import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS
from safetensors import safe_open

from phireg import demo, registry
from phireg.family import Family
from phireg.formats import FORMATS
from phireg.layout.rules import QuantRules

Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
LAYERS = 2
LINEARS = 4 * LAYERS
QKV = "transformer.layers.1.attention.qkv"
SOURCE = "model.layers.1.self_attn.qkv_proj"


@pytest.fixture
def show(run):
    def show(*args):
        result = run(*args)
        assert result.exit_code == 0, result.output
        return json.loads(result.output) if "--json" in args else result.output

    return show


@pytest.fixture
def plan(tiny, show):
    return partial(show, "plan", "--model-dir", tiny)


@pytest.fixture
def explain(tiny, show):
    return partial(show, "explain", tiny)


# ---- plan ---------------------------------------------------------------------------------------


def test_weights_only_has_no_scales_unless_there_is_a_cache(plan):
    text = plan("--qformat", "int4_wo")
    assert "calibration" not in text and "scal" not in text
    text = plan("--qformat", "int4_wo", "--kv-cache-dtype", "fp8")
    assert "kv_cache_scaling_factor" in text and "weights_scaling_factor" not in text
    assert "calibration" in text


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int8_wo"])
def test_json_is_what_quantize_writes(plan, tiny, run, qformat):
    options = ("--qformat", qformat, "--kv-cache-dtype", "fp8", "--tp-size", 2)
    document = plan(*options, "--json")
    ids = tiny.parent / "ids.jsonl"
    ids.write_text('{"input_ids": [1, 2, 3]}\n' * 3)
    out = tiny.parent / "out"
    result = run(
        "quantize", "--model-dir", tiny, "--output-dir", out, *options, "--calib-file", ids,
        "--no-measure", "--quiet", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert document["config"] == json.loads((out / "config.json").read_text())
    assert document["bytes_out"] == sum(file.stat().st_size for file in out.glob("rank*"))
    assert document["calibrated"] and document["qformat"] == qformat
    written = {}
    for rank in range(2):
        with safe_open(out / f"rank{rank}.safetensors", "np") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                written[f"rank{rank}.safetensors", name] = entry.get_dtype(), entry.get_shape()
    outputs = document["outputs"]
    assert {(o["file"], o["tensor"]): (o["dtype"], o["shape"]) for o in outputs} == written
    layers = [f"transformer.layers.{n}" for n in range(LAYERS)]
    assert document["kv_caches"] == [f"{layer}.attention" for layer in layers]
    names = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    linears = {f"{layer}.{name}" for layer in layers for name in names}
    assert {x["target"] for x in document["linears"]} == (
        linears if qformat != "int8_wo" else set()
    )


def test_a_plan_with_errors_writes_nothing(tiny, run):
    result = run("plan", "--model-dir", tiny, "--qformat", "fp8", "--tp-size", 3)
    assert result.exit_code == 3
    assert result.output.startswith("answer  tp sizes that work: 1, 2, 4;")
    assert "scales" not in result.output
    config(hidden_act="relu", mlp_bias=True)(tiny)
    result = run("plan", "--model-dir", tiny)
    assert result.exit_code == 3
    lines = [line for line in result.output.splitlines() if "phi3_mini/config.py:" in line]
    assert len({line.rpartition("[")[2] for line in lines}) == len(lines) == 2


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (("--kv-cache-dtype", "fp8"), "fp8"),
        (("--qformat", "fp4"), "--qformat"),
        (("--qformat", "fp8", "--kv-cache-dtype", "fp4"), "--kv-cache-dtype"),
    ],
)
def test_wrong_usage(args, option, tiny, run):
    for command in (("plan", "--model-dir", tiny), ("explain", tiny, "lm_head")):
        result = run(*command, *args)
        assert result.exit_code == 2
        assert option in result.output
        assert result.output.count("error:") <= 1


# ---- explain ------------------------------------------------------------------------------------


def ranges(text):
    lines = [line.split(" = ") for line in text.splitlines() if " = " in line]
    return [(a.strip(), b.strip()) for a, b in lines]


ROWS_OF_RANK_1 = [
    ("0:16", f"{Q // 2}:{Q}"),
    ("16:24", f"{Q + KV // 2}:{Q + KV}"),
    ("24:32", f"{Q + KV + KV // 2}:{Q + 2 * KV}"),
]


@pytest.mark.parametrize(("qformat", "kind"), [("fp8", "F8_E4M3"), ("int8_sq", "I8")])
def test_a_quantized_weight(explain, qformat, kind):
    text = explain(f"{QKV}.weight", "--qformat", qformat, "--tp-size", 2, "--rank", 1)
    assert f"{QKV}.weight  [32, {HIDDEN}] {kind}" in text
    assert f"{SOURCE}.weight  [{Q + 2 * KV}, {HIDDEN}] float16" in text
    assert ranges(text) == ROWS_OF_RANK_1
    last = text.splitlines()[-1]
    assert "weights_scaling_factor" in last and kind in last
    assert ("prequant_scaling_factor" in last) == (qformat == "int8_sq")
    assert "quantized" not in explain("lm_head.weight", "--qformat", qformat)
    assert "quantized" not in explain(f"{QKV}.weight", "--qformat", "int8_wo")


def test_a_scale_follows_the_rows_or_columns_of_its_weight(explain):
    options = ("--qformat", "int8_sq", "--tp-size", 2, "--rank", 1)
    text = explain(f"{QKV}.weights_scaling_factor", *options)
    assert f"{SOURCE}.weights_scaling_factor  [{Q + 2 * KV}] float32" in text
    assert f"{SOURCE}.weight" in text and "/ 127" in text
    assert ranges(text) == ROWS_OF_RANK_1
    text = explain("transformer.layers.0.mlp.proj.prequant_scaling_factor", *options)
    assert "model.layers.0.mlp.down_proj" in text
    half = INTERMEDIATE // 2
    assert ranges(text) == [(f"0:{half}", f"{half}:{INTERMEDIATE}")]


CACHE = "transformer.layers.1.attention.kv_cache_scaling_factor"


@pytest.mark.parametrize(
    ("tensor", "args", "divisor"),
    [
        (f"{QKV}.weights_scaling_factor", ("fp8",), "/ 448"),
        (f"{QKV}.activation_scaling_factor", ("int8_sq",), "/ 127"),
        (CACHE, ("int8_wo", "--kv-cache-dtype", "fp8"), "/ 448, but at least 1"),
        (CACHE, ("fp8", "--kv-cache-dtype", "int8"), "/ 127\n"),
    ],
)
def test_a_scale_of_one_number(explain, tensor, args, divisor):
    text = explain(tensor, "--qformat", *args)
    assert divisor in text
    assert ranges(text) == []
    assert "  in model" not in text, "it is in no source file"


def test_a_scale_of_several_modules(run):
    """phi-2 has q, k and v apart: one scale for the three."""
    name = "transformer.layers.0.attention.qkv.weights_scaling_factor"
    text = run("explain", demo.find("phi2").directory, name, "--qformat", "fp8").output
    assert all(f"model.layers.0.self_attn.{n}_proj.weight" in text for n in "qkv")


def test_explain_quantized_json(explain):
    document = explain(f"{QKV}.activation_scaling_factor", "--qformat", "fp8", "--json")
    (entry,) = document["outputs"][0]["rows"]
    assert entry["rows"] == [0, 1]
    assert entry["from"]["computed_from"] == ["calibration"]
    assert (entry["from"]["file"], entry["from"]["bytes"]) == (None, None)
    document = explain(f"{QKV}.weight", "--qformat", "fp8", "--json")
    assert {e["from"]["computed_from"] for e in document["outputs"][0]["rows"]} == {None}


# ---- families -----------------------------------------------------------------------------------


def test_families_that_quantize_some_formats(run, monkeypatch):
    def rules(family, fields, scheme):
        covered = scheme == "FP8" and family.name.startswith("phi3")
        covered &= fields["max_position_embeddings"] == 4096
        return QuantRules(("lm_head",) if covered else ())

    monkeypatch.setattr(Family, "quant_rules", rules)
    document = json.loads(run("families", "--json").output)
    families = {family["name"]: family for family in document["families"]}
    assert families["phi2"]["quantization"] == []
    assert families["phi3-mini"]["quantization"] == ["fp8"]
    assert [m["qformats"] for m in families["phi3-mini"]["published"]] == [["fp8"], []]


@pytest.mark.parametrize("target", ["trtllm", "hf-modelopt", "hf-compressed-tensors"])
def test_every_scale_of_every_format_is_explained(tmp_path, show, target):
    """The name that the file has, the formula's end, and the weight's rounding."""
    model = exports.source("phi2", tmp_path / "model")
    layouts = registry.load_target(target).layouts
    own = "transformer.layers.0.mlp.proj" if target == "trtllm" else "model.layers.0.mlp.fc2"
    ends = {"e4m3": "448", "int8": "127", "int4": "7", "e2m1": "6"}
    for qformat, layout in layouts.items():
        text = show("explain", model, own, "--target", target, "--qformat", qformat)
        for scale in layout.scales.values():
            assert f"{own}.{scale.name}  [" in text
        if layout.weight is None:
            assert "quantized" not in text
            continue
        assert "quantized: cast to" in text
        assert f"/ {ends[FORMATS[qformat].weight]}" in text
