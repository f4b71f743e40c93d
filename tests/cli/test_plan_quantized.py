"""``plan``, ``explain`` and ``families`` tell the truth about quantization.

What is told is held against what ``quantize`` then writes, read and reported by others.
"""

import json

import pytest
from helpers.damage import config
from helpers.tiny_phi3 import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, tiny_tensors
from safetensors import safe_open

from phireg.layout.rules import QuantRules

Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
LAYERS = 2
LINEARS = 4 * LAYERS
QKV = "transformer.layers.1.attention.qkv"
SOURCE = "model.layers.1.self_attn.qkv_proj"


@pytest.fixture
def plan(tiny, run):
    def go(*args, command=("plan", "--model-dir")):
        result = run(*command, tiny, *args)
        assert result.exit_code == 0, result.output
        return json.loads(result.output) if "--json" in args else result.output

    return go


@pytest.fixture
def explain(tiny, run):
    def go(tensor, *args):
        result = run("explain", tiny, tensor, *args)
        assert result.exit_code == 0, result.output
        return json.loads(result.output) if "--json" in args else result.output

    return go


def row(text, label):
    """What stands behind a label, with the lines below that have none."""
    lines = iter(text.splitlines())
    found = next(line for line in lines if line.startswith(f"{label} "))
    rows = [found.split(maxsplit=1)[1]]
    for line in lines:
        if not line.startswith("   "):
            break
        rows.append(line.strip())
    return rows


def linears_bytes():
    layers = {name: t.nbytes for name, t in tiny_tensors().items() if "_proj.weight" in name}
    assert len(layers) == LINEARS
    return sum(layers.values())


# ---- plan ---------------------------------------------------------------------------------------


def test_fp8(plan):
    text = plan("--qformat", "fp8", "--kv-cache-dtype", "int8", "--tp-size", 2)
    read = sum(tensor.nbytes for tensor in tiny_tensors().values())
    assert row(text, "reads") == [
        f"{read / 1000:.1f} kB in 3 files, 15 tensors, each once to be written, and "
        f"{linears_bytes() / 1000:.1f} kB before that for the scales"
    ]
    (writes,) = row(text, "writes")
    assert writes.startswith("2 x ")
    assert writes.endswith(
        f"2 x {15 + 2 * LINEARS + LAYERS} tensors, FP8, 8 linears, the rest float16; INT8 KV cache"
    )
    assert row(text, "scales") == [
        "weights_scaling_factor of 8 linears, from the weights",
        "activation_scaling_factor of 8 linears, from calibration",
        "kv_cache_scaling_factor of 2 attention modules, from calibration",
    ]
    assert row(text, "needs")[0].startswith("calibration")
    assert "two passes, besides calibration" in row(text, "peak")[0]
    targets = 2 * (15 + 2 * LINEARS + LAYERS)
    assert f"15/15 source tensors mapped, {targets}/{targets} targets" in row(text, "checks")[0]
    assert "no value changes" not in text


def test_smoothquant_with_a_cast(plan):
    text = plan("--qformat", "int8_sq", "--dtype", "bfloat16")
    assert "(twice with --alpha below 1)" in row(text, "reads")[0]
    assert row(text, "writes")[0].endswith(
        "W8A8_SQ_PER_CHANNEL, 8 linears, the rest bfloat16; 15 tensors cast to bfloat16 first"
    )
    assert row(text, "scales") == [
        "prequant_scaling_factor of 8 linears, from calibration",
        "weights_scaling_factor of 8 linears, from calibration and the weights",
        "activation_scaling_factor of 8 linears, from calibration",
    ]


def test_weights_only_with_and_without_a_cache(plan):
    text = plan("--qformat", "int4_wo")
    assert text == plan("--use-weight-only", "--weight-only-precision", "int4")
    assert row(text, "reads")[0].endswith("15 tensors, each once")
    assert row(text, "writes")[0].endswith(
        "W4A16, float16 weights, which TensorRT-LLM's builder quantizes; no value changes"
    )
    assert row(text, "peak")[0].endswith("one pass")
    assert "calibration" not in text
    assert "scal" not in text
    text = plan("--qformat", "int4_wo", "--kv-cache-dtype", "fp8")
    assert row(text, "reads")[0].endswith("15 tensors, each once")
    assert row(text, "scales") == [
        "kv_cache_scaling_factor of 2 attention modules, from calibration"
    ]
    assert row(text, "needs")[0].startswith("calibration")
    assert row(text, "peak")[0].endswith("one pass, besides calibration")


@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int8_wo"])
def test_json_is_what_quantize_writes(plan, tiny, run, qformat):
    options = ("--qformat", qformat, "--kv-cache-dtype", "fp8", "--tp-size", 2)
    told = plan(*options, "--json")
    ids = tiny.parent / "ids.jsonl"
    ids.write_text('{"input_ids": [1, 2, 3]}\n' * 3)
    out = tiny.parent / "out"
    made = run(
        "quantize", "--model-dir", tiny, "--output-dir", out, *options, "--calib-file", ids,
        "--no-measure", "--quiet", "--device", "cpu",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert told["config"] == json.loads((out / "config.json").read_text())
    assert told["bytes_out"] == sum(file.stat().st_size for file in out.glob("rank*"))
    assert (told["calibrated"], told["qformat"], told["kv_cache_dtype"]) == (True, qformat, "fp8")
    written = {}
    for rank in range(2):
        with safe_open(out / f"rank{rank}.safetensors", "np") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                written[f"rank{rank}.safetensors", name] = entry.get_dtype(), entry.get_shape()
    assert {(o["file"], o["tensor"]): (o["dtype"], o["shape"]) for o in told["outputs"]} == written
    layers = [f"transformer.layers.{n}" for n in range(LAYERS)]
    assert told["kv_caches"] == [f"{layer}.attention" for layer in layers]
    names = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    wanted = {f"{layer}.{name}" for layer in layers for name in names}
    assert {x["target"] for x in told["linears"]} == (wanted if qformat != "int8_wo" else set())
    scales = {
        (output["tensor"].rpartition(".")[2], tuple(entry["from"]["computed_from"]))
        for output in told["outputs"]
        for entry in output["rows"]
        if entry["from"] and entry["from"]["computed_from"] is not None
    }
    both = {"fp8": ("weights",), "int8_sq": ("calibration", "weights")}
    kinds = {"kv_cache_scaling_factor": ("calibration",)}
    if qformat != "int8_wo":
        kinds |= {"activation_scaling_factor": ("calibration",)}
        kinds |= {"weights_scaling_factor": both[qformat]}
    if qformat == "int8_sq":
        kinds |= {"prequant_scaling_factor": ("calibration",)}
    assert scales == set(kinds.items())


def test_problems_of_a_quantized_plan(tiny, run):
    result = run("plan", "--model-dir", tiny, "--qformat", "fp8", "--tp-size", 3)
    assert result.exit_code == 3
    assert "writes  nothing" in result.output
    assert "scales" not in result.output


@pytest.mark.parametrize("command", [("plan", "--model-dir"), ("explain",)])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--use-weight-only", "--qformat", "fp8"), "--use-weight-only and --qformat fp8 exclude"),
        (
            (*("--use-weight-only", "--weight-only-precision", "int4"), "--qformat", "int4_wo"),
            "--use-weight-only and --qformat int4_wo exclude",
        ),
        (("--kv-cache-dtype", "fp8"), "needs a quantization format"),
        (("--qformat", "fp4"), "--qformat"),
        (("--qformat", "fp8", "--kv-cache-dtype", "fp4"), "--kv-cache-dtype"),
    ],
)
def test_wrong_usage(command, args, says, tiny, run):
    tensor = ("lm_head",) if command == ("explain",) else ()
    result = run(*command, tiny, *tensor, *args)
    assert result.exit_code == 2
    assert says in result.output
    assert result.output.count("error:") <= 1


def test_convert_takes_no_format(tiny, run):
    result = run("convert", "--model-dir", tiny, "--output-dir", "out", "--qformat", "fp8")
    assert result.exit_code == 2
    assert "No such option" in result.output


def test_a_config_entry_is_named_by_its_line(tiny, run):
    config(hidden_act="relu", mlp_bias=True)(tiny)
    result = run("plan", "--model-dir", tiny)
    assert result.exit_code == 3
    found = [line for line in result.output.splitlines() if "phi3_mini/config.py:" in line]
    assert len({line.rpartition("[")[2] for line in found}) == len(found) == 2


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
    last = text.splitlines()[-1].strip()
    assert last.startswith("quantized: cast to float16, ")
    assert "weights_scaling_factor" in last
    assert last.endswith(f"rounded to {kind}")
    assert ("prequant_scaling_factor" in last) == (qformat == "int8_sq")
    assert "quantized" not in explain("lm_head.weight", "--qformat", qformat)
    assert "quantized" not in explain(f"{QKV}.weight", "--qformat", "int8_wo")


def test_a_scale_for_each_row(explain):
    name = f"{QKV}.weights_scaling_factor"
    text = explain(name, "--qformat", "int8_sq", "--tp-size", 2, "--rank", 1)
    assert f"{SOURCE}.weights_scaling_factor  [{Q + 2 * KV}] float32" in text
    assert f"computed for each row of {SOURCE}.weight: its largest absolute value" in text
    assert "/ 127" in text
    assert ranges(text) == ROWS_OF_RANK_1


def test_a_scale_for_each_channel(explain):
    name = "transformer.layers.0.mlp.proj.prequant_scaling_factor"
    text = explain(name, "--qformat", "int8_sq", "--tp-size", 2, "--rank", 1)
    assert "computed from calibration, for each input channel of model.layers.0.mlp.down_proj" in (
        text
    )
    half = INTERMEDIATE // 2
    assert ranges(text) == [(f"0:{half}", f"{half}:{INTERMEDIATE}")]


@pytest.mark.parametrize(
    ("tensor", "args", "says"),
    [
        (
            f"{QKV}.weights_scaling_factor",
            ("fp8",),
            f"computed from the weights: the largest absolute value in {SOURCE}.weight / 448",
        ),
        (
            f"{QKV}.activation_scaling_factor",
            ("fp8",),
            f"computed from calibration: the largest absolute input of {SOURCE} / 448",
        ),
        (
            f"{QKV}.activation_scaling_factor",
            ("int8_sq",),
            f"input of {SOURCE}, after prequant_scaling_factor, / 127",
        ),
        (
            "transformer.layers.1.attention.kv_cache_scaling_factor",
            ("int8_wo", "--kv-cache-dtype", "fp8"),
            "the largest absolute key or value of the layer / 448, but at least 1",
        ),
        (
            "transformer.layers.1.attention.kv_cache_scaling_factor",
            ("fp8", "--kv-cache-dtype", "int8"),
            "the largest absolute key or value of the layer / 127\n",
        ),
    ],
)
def test_a_scale_of_one_number(explain, tensor, args, says):
    text = explain(tensor, "--qformat", *args)
    assert says in text
    assert text.endswith("    one number\n")
    assert ".safetensors" in text
    assert "  in model" not in text, "it is in no source file"


def test_a_scale_of_several_modules(run):
    """phi-2 has q, k and v apart: one scale for the three."""
    from phireg import demo

    name = "transformer.layers.0.attention.qkv.weights_scaling_factor"
    model = demo.find("phi2").directory
    text = run("explain", model, name, "--qformat", "fp8").output
    q, k, v = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv")
    assert f"the largest absolute value in {q}, {k} and {v} / 448" in text


def test_explain_json(explain):
    told = explain(f"{QKV}.activation_scaling_factor", "--qformat", "fp8", "--json")
    (entry,) = told["outputs"][0]["rows"]
    assert entry["rows"] == [0, 1]
    assert entry["from"]["computed_from"] == ["calibration"]
    assert (entry["from"]["file"], entry["from"]["bytes"]) == (None, None)
    told = explain(f"{QKV}.weight", "--qformat", "fp8", "--json")
    assert {e["from"]["computed_from"] for e in told["outputs"][0]["rows"]} == {None}


# ---- families -----------------------------------------------------------------------------------


def test_families_that_quantize_some_formats(run, monkeypatch):
    from phireg.family import Family

    def rules(family, fields, scheme):
        covered = scheme == "FP8" and family.name.startswith("phi3")
        covered &= fields["max_position_embeddings"] == 4096
        return QuantRules(("lm_head",) if covered else ())

    monkeypatch.setattr(Family, "quant_rules", rules)
    told = {f["name"]: f for f in json.loads(run("families", "--json").output)["families"]}
    assert told["phi2"]["quantization"] == []
    assert told["phi3-mini"]["quantization"] == ["fp8"]
    assert [m["qformats"] for m in told["phi3-mini"]["published"]] == [["fp8"], []]
    text = run("families").output
    short, long = (m["repo_id"] for m in told["phi3-mini"]["published"])
    assert f"  quantization  fp8  ({short})\n  quantization  none  ({long})\n" in text
    assert "  quantization  none\n" in text, "phi2"
