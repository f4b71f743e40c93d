"""Schemes, as TensorRT-LLM names them, and what a plan says before any calibration."""

import json

import numpy as np
import pytest
import torch
from helpers.by_hand import KV_HEADS, calibration, model, rank, whole, write_model
from helpers.plan_sources import LAYERS, MODELS, PHI3, planned
from phireg_plugins.phi3_mini import FAMILY

import phireg
from phireg.api import COPY, Linear, QuantRules, Rules, Table, const, hookimpl, src, tied
from phireg.errors import UsageError
from phireg.findings import UNMEASURED, Severity
from phireg.layout.spans import Span
from phireg.planning.model import Basis, Scale
from phireg.planning.report import as_json, output_json
from phireg.reader.schemes import SCHEMES

LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
CODES = {torch.float16: "F16", torch.float32: "F32", torch.int8: "I8"} | {
    torch.float8_e4m3fn: "F8_E4M3"
}


def source(tmp_path, key="mini", **config):
    directory = write_model(tmp_path / "hf", key, model(key))
    (directory / "config.json").write_text(json.dumps({**MODELS[key][1], **config}))
    return directory


# --- complete before calibration --------------------------------------------------------------


@pytest.mark.parametrize("key", list(KV_HEADS))
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_plan_knows_every_tensor(tmp_path, key, qformat, tp):
    """Names, dtypes and per-rank shapes against the tensors computed by hand."""
    directory = write_model(tmp_path / "hf", key, model(key))
    options = {"family": MODELS[key][0], "tp_size": tp}
    plan = phireg.plan(directory, qformat=qformat, kv_cache_dtype="fp8", **options)
    plain = phireg.plan(directory, **options)
    linears = whole(key, model(key), calibration(key), qformat, "float16")
    for index in range(tp):
        kinds = {o.name: (o.dtype, o.shape) for o in plan.outputs if o.rank == index}
        expected = {o.name: (o.dtype, o.shape) for o in plain.outputs if o.rank == index}
        expected |= {
            name: (CODES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in rank(key, linears, tp, index).items()
        }
        expected |= {
            f"transformer.layers.{i}.attention.kv_cache_scaling_factor": ("F32", (1,))
            for i in range(LAYERS)
        }
        assert kinds == expected
    assert plan.file_sizes == tuple(
        len(plan.headers[0]) + sum(np.prod(s) * {"F16": 2, "F32": 4}.get(c, 1)
                                   for c, s in kinds.values()) for _ in range(tp)
    )  # fmt: skip
    assert plan.bytes_in == plain.bytes_in and plan.casts == plain.casts


_AWQ = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
GROUPS = {"int4_awq": _AWQ, "w4a8_awq": _AWQ, "nvfp4": {"group_size": 16}}


@pytest.mark.parametrize("cache", [None, "fp8", "int8"])
@pytest.mark.parametrize("qformat", list(SCHEMES))
def test_the_quantization_block_has_no_key_that_an_old_reader_refuses(tmp_path, qformat, cache):
    options = {"family": "phi3-mini", "qformat": qformat, "kv_cache_dtype": cache}
    plan = phireg.plan(source(tmp_path), **options)
    assert plan.config["quantization"] == {
        "quant_algo": SCHEMES[qformat].quant_algo,
        "kv_cache_quant_algo": cache and cache.upper(),
        "exclude_modules": ["lm_head", "*vocab_embedding"],
        **GROUPS.get(qformat, {}),
    }
    assert plan.options.weight_only == {"int8_wo": "int8", "int4_wo": "int4"}.get(qformat)
    assert plan.options.calibrated == (not qformat.endswith("_wo") or cache is not None)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"qformat": "int5"}, "int5"),
        ({"qformat": "fp8", "kv_cache_dtype": "int4"}, "int4"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
    ],
)
def test_impossible_options(tmp_path, options, name):
    with pytest.raises(UsageError, match=f"'{name}'") as caught:
        phireg.plan(tmp_path, **options)
    assert caught.value.hint


def test_weights_only_has_neither_scales_nor_linears(tmp_path):
    directory = source(tmp_path)
    for qformat in ("int8_wo", "int4_wo"):
        plan = phireg.plan(directory, family="phi3-mini", qformat=qformat)
        assert plan.scales == {} and plan.linears == ()


def test_a_plan_as_json_says_what_is_computed(tmp_path):
    plan = phireg.plan(source(tmp_path), family="phi3-mini", qformat="int8_sq", tp_size=2)
    report = json.loads(json.dumps(as_json(plan, workers=2)))
    assert (report["qformat"], report["kv_cache_dtype"]) == ("int8_sq", None)
    outputs = {(o["file"], o["tensor"]): o for o in report["outputs"]}
    scale = outputs["rank1.safetensors", "transformer.layers.0.mlp.fc.weights_scaling_factor"]
    module = "model.layers.0.mlp.gate_up_proj"
    computed = {"file": None, "bytes": None, "columns": []}
    computed["tensor"] = f"{module}.weights_scaling_factor"
    computed["computed_from"] = ["calibration", "weights"]
    assert scale["rows"] == [
        {"rows": [0, 10], "from": {**computed, "rows": [30, 40]}},  # up
        {"rows": [10, 20], "from": {**computed, "rows": [10, 20]}},  # gate
    ]
    name = "transformer.layers.0.mlp.proj.prequant_scaling_factor"
    (row,) = outputs["rank1.safetensors", name]["rows"]
    assert row["from"]["tensor"] == name and row["from"]["rows"] == [10, 20]
    assert row["from"]["computed_from"] == ["calibration"]
    fp8 = phireg.plan(tmp_path / "hf", family="phi3-mini", qformat="fp8")
    assert {(n.rpartition(".")[2], s.computed_from) for n, s in fp8.scales.items()} == {
        ("weights_scaling_factor", (Basis.WEIGHTS,)),
        ("activation_scaling_factor", (Basis.CALIBRATION,)),
    }
    (output,) = [o for o in plan.outputs if o.name == name and o.rank == 0]
    assert output_json(plan, output)["bytes"] == 20


# --- what speaks against it -------------------------------------------------------------------


def rules_of(*linears, caches=(), **more):
    """The family with other quantization rules."""

    class Step:
        @hookimpl
        def phireg_quant_rules(self, config):
            return QuantRules(tuple(linears), tuple(caches), **more)

    return FAMILY.derive("other", Step())


def weights_of(change):
    class Step:
        @hookimpl(wrapper=True)
        def phireg_weight_rules(self, config, hf):
            rules = yield
            return change(rules)

    return FAMILY.derive("other", Step())


def errors(plan):
    return [
        (f.code, f.subject, f.detail)
        for f in plan.findings
        if f.severity is Severity.ERROR and f.code == "quant"
    ]


@pytest.mark.parametrize("qformat", ["fp8", "int8_wo"])
def test_a_linear_that_no_rule_makes(tmp_path, qformat):
    family = rules_of("transformer.layers.0.mlp.gate", "transformer.ln_f", "lm_head")
    plan = planned(family, source(tmp_path), qformat=qformat)
    assert [subject for _, subject, _ in errors(plan)][:2] == [
        "transformer.layers.0.mlp.gate",
        "transformer.ln_f",
    ]


def test_padded_rows_have_no_scale(tmp_path):
    plan = planned(rules_of("lm_head"), source(tmp_path), qformat="int8_sq", tp_size=2)
    assert [subject for _, subject, _ in errors(plan)] == ["lm_head"]


def test_a_source_that_two_targets_read(tmp_path):
    """The scale of one of them would have to be that of the other."""

    def change(rules):
        module = "model.layers.0.mlp.gate_up_proj"
        again = Table("transformer.again", tied(src(module, 40)), 24)
        return Rules(*rules.values(), again)

    plan = planned(weights_of(change), source(tmp_path), qformat="fp8")
    ((_, subject, detail),) = errors(plan)
    assert subject == "transformer.layers.0.mlp.fc"
    assert "model.layers.0.mlp.gate_up_proj" in detail and "transformer.again" in detail


def test_a_family_that_names_nothing_for_a_scheme_or_cache(tmp_path):
    """It must not end in a checkpoint whose config alone is quantized."""
    plan = planned(rules_of(), source(tmp_path), qformat="int8_wo", kv_cache_dtype="fp8")
    assert {subject for _, subject, _ in errors(plan)} == {"int8_wo", "KV cache"}


def test_a_linear_that_the_rules_forget_is_what_the_reader_misses(tmp_path):
    names = [f"transformer.layers.{i}.{n}" for i in range(LAYERS) for n in LINEARS]
    names.remove("transformer.layers.1.mlp.fc")
    plan = planned(rules_of(*names), source(tmp_path), qformat="fp8")
    companions = ("weight", "weights_scaling_factor", "activation_scaling_factor")
    assert {(f.code, f.subject) for f in plan.errors} == {
        ("schema", f"transformer.layers.1.mlp.fc.{companion}") for companion in companions
    }
    excluded = planned(
        rules_of(*names, exclude_modules=("lm_head", "*vocab_embedding", "*.1.mlp.fc")),
        tmp_path / "hf",
        qformat="fp8",
    )
    assert not excluded.errors


@pytest.mark.parametrize(("qformat", "owner"), [("fp8", "transformer.one"), ("int8_sq", "one")])
def test_a_quantized_linear_of_one_row(tmp_path, qformat, owner):
    """Its scale per row and its scale per tensor have the same shape, and are not the same."""

    class Step:
        @hookimpl(wrapper=True)
        def phireg_config_fields(self):
            table = yield
            return table.replace(const("architecture", "UnknownToTheSchema"))

        @hookimpl(wrapper=True)
        def phireg_weight_rules(self, config, hf):
            rules = yield
            return Rules(*rules.values(), Linear("transformer.one", src("one", 1), 24, COPY))

        @hookimpl
        def phireg_quant_rules(self, config):
            return QuantRules(("transformer.one",))

    tensors = model("mini") | {"one.weight": torch.ones(1, 24)}
    directory = write_model(tmp_path / "hf", "mini", tensors)
    plan = planned(FAMILY.derive("other", Step()), directory, qformat=qformat, tp_size=2)
    assert not plan.errors
    name = "transformer.one.weights_scaling_factor"
    for output in (o for o in plan.outputs if o.name == name):
        assert output.shape == (1,)
        assert output.origin == Scale((Span(f"{owner}.weights_scaling_factor", 0, 1),))
    assert {n.rpartition(".")[0] for n in plan.scales if "weights" in n} == {owner}


def test_notes_and_warnings(tmp_path):
    plan = phireg.plan(source(tmp_path, "phi2"), family="phi2", qformat="fp8")
    notes = [f.detail for f in plan.findings if f.code == "quant"]
    assert len(notes) == 1
    plan = phireg.plan(tmp_path / "hf", family="phi2", qformat="int8_wo")
    assert not [f for f in plan.findings if f.code == "quant"]


def test_fp8_kernels_want_multiples_of_16(tmp_path):
    plan = phireg.plan(source(tmp_path), family="phi3-mini", qformat="fp8", tp_size=2)
    warned = {f.subject for f in plan.findings if f.code == "alignment"}
    assert warned == {f"transformer.layers.{i}.{n}.weight" for i in range(LAYERS) for n in LINEARS}
    assert {f.severity for f in plan.findings if f.code == "alignment"} == {Severity.WARNING}
    plan = phireg.plan(tmp_path / "hf", family="phi3-mini", qformat="int8_sq", tp_size=2)
    assert not [f for f in plan.findings if f.code == "alignment"]


def test_a_cache_of_8_bits_on_phi2(tmp_path):
    directory = source(tmp_path, "phi2")
    warned = {}
    for cache in (None, "fp8", "int8"):
        plan = phireg.plan(directory, family="phi2", qformat="int8_sq", kv_cache_dtype=cache)
        warned[cache] = [f.severity for f in plan.findings if f.code == UNMEASURED]
    assert warned == {None: [], "fp8": [Severity.NOTE], "int8": [Severity.NOTE]}


def test_fp8_keys_of_a_long_rope_model(tmp_path):
    config = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3},
    }
    assert PHI3["hidden_size"] // PHI3["num_attention_heads"] == 6
    directory = source(tmp_path, **config)
    warned = {}
    for cache in (None, "fp8", "int8"):
        plan = phireg.plan(directory, family="phi3-mini", qformat="int8_sq", kv_cache_dtype=cache)
        assert not plan.errors
        warned[cache] = [f.severity for f in plan.findings if f.code == "kv-cache"]
    assert warned == {None: [], "fp8": [Severity.WARNING], "int8": []}
