"""All problems of a source are reported at once, with layers folded."""

import inspect
import re

import numpy as np
import pytest
from helpers.plan_sources import LAYERS, MODELS, PHI3, addresses, planned, write
from phireg_plugins.phi3_mini import FAMILY, config, weights

import phireg
from phireg.api import COLUMN, Linear, Rules, hookimpl, parts, select, src
from phireg.errors import PlanError, SourceError
from phireg.findings import Finding, Severity
from phireg.planning.report import fold, problems, ranges

_, MINI, SHAPES = MODELS["mini"]


def damaged():
    tensors = addresses(SHAPES)
    for i in range(LAYERS):
        del tensors[f"model.layers.{i}.self_attn.o_proj.weight"]
        tensors[f"model.layers.{i}.self_attn.q_norm.weight"] = np.ones(3, np.uint32)
    tensors["model.norm.weight"] = np.ones(23, np.uint32)
    tensors["lm_head.weight"] = np.ones((37, 24), np.int64)
    tensors["model.layers.2.mlp.down_proj.weight"] = np.ones((20, 24), np.uint32)
    return tensors


def test_all_problems_at_once(tmp_path):
    source = write(tmp_path / "hf", MINI, damaged())
    plan = phireg.plan(source, family="phi3-mini", tp_size=3)
    layers = [f"model.layers.{i}" for i in range(LAYERS)]
    targets = [f"transformer.layers.{i}" for i in range(LAYERS)]
    cut = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    assert {(f.code, f.subject) for f in plan.errors} == {
        *(("missing", f"{layer}.self_attn.o_proj.weight") for layer in layers),
        *(("unmapped", f"{layer}.self_attn.q_norm.weight") for layer in layers),
        ("shape", "model.norm.weight"),
        ("dtype", "lm_head.weight"),
        ("shape", "model.layers.2.mlp.down_proj.weight"),
        *(("sharding", f"{target}.{name}") for target in targets for name in cut),
    }
    assert (plan.outputs, plan.headers, plan.tasks) == ((), (), ())


def test_the_message_folds_layers_and_names_the_rule(tmp_path):
    source = write(tmp_path / "hf", MINI, damaged())
    with pytest.raises(PlanError) as caught:
        phireg.convert(phireg.plan(source, family="phi3-mini"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = {line.split()[0]: line for line in caught.value.message.splitlines()[1:]}
    assert "model.layers.{0..2}.self_attn.o_proj.weight" in lines["missing"]
    assert "transformer.layers.{0..2}.attention.dense" in lines["missing"]
    assert "[20, 24]" in caught.value.message and "[24, 20]" in caught.value.message
    file, number = re.search(r"\[(.*):(\d+)\]", lines["missing"]).groups()
    source_lines, first = inspect.getsourcelines(weights.layer)
    assert file == "phi3_mini/weights.py"
    assert first < int(number) < first + len(source_lines)


def test_a_config_with_errors_is_all_that_is_reported(tmp_path):
    source = write(tmp_path / "hf", {**PHI3, "hidden_act": "gelu", "mlp_bias": True}, damaged())
    plan = phireg.plan(source, family="phi3-mini")
    assert {(f.code, f.subject) for f in plan.errors} == {
        ("config", "hidden_act"),
        ("config", "mlp_bias"),
    }
    assert any("not checked" in f.detail for f in plan.findings if f.severity is Severity.NOTE)
    _, first = inspect.getsourcelines(config.phireg_config_fields)
    for error in plan.errors:
        file, number = error.where.split(":")
        line = inspect.getsource(config).splitlines()[int(number) - 1]
        assert (file, int(number) > first) == ("phi3_mini/config.py", True)
        assert f'"{error.subject}"' in line


def test_an_unknown_dtype_is_refused(tmp_path):
    source = write(tmp_path / "hf", {**MINI, "torch_dtype": "float8"}, addresses(SHAPES))
    (error,) = phireg.plan(source, family="phi3-mini").errors
    assert (error.code, error.subject) == ("dtype", "torch_dtype")
    assert not phireg.plan(source, family="phi3-mini", dtype="bfloat16").errors


@pytest.mark.parametrize(
    "stated, stored, dtype",
    [
        ("float32", "f4", "float16"),
        ("torch.bfloat16", "f4", "bfloat16"),
        (None, "f4", "float16"),
        (None, "f2", "float16"),  # most of the bytes
    ],
)
def test_auto_dtype(tmp_path, stated, stored, dtype):
    tensors = {n: t.astype(stored) for n, t in addresses(SHAPES).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("f4")
    source = write(tmp_path / "hf", {**MINI, "torch_dtype": stated}, tensors)
    plan = phireg.plan(source, family="phi3-mini")
    assert plan.options.dtype == dtype
    assert plan.casts == (1 if stored == "f2" else len(tensors))


@pytest.mark.parametrize(
    "extra, name",
    [
        ({"vision_config": {}}, "vision_config"),
        ({"embd_layer": {"embedding_cls": "image"}}, "embd_layer"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"peft_type": "LORA"}, "LoRA"),
    ],
)
def test_unsupported_models(tmp_path, extra, name):
    source = write(tmp_path / "hf", {**MINI, **extra}, addresses(SHAPES))
    with pytest.raises(SourceError, match=name) as caught:
        phireg.plan(source)
    assert caught.value.hint


# --- rules that are wrong --------------------------------------------------------------------


def family_with(change):
    """phi3-mini with amended rules."""

    class Amend:
        @hookimpl(wrapper=True)
        def phireg_weight_rules(self, config):
            rules = yield
            return change(rules, config)

    return FAMILY.derive("amended", Amend())


def test_rows_that_two_rules_use(tmp_path):
    def change(rules, config):
        return rules.replace(*(
            Linear(f"transformer.layers.{i}.{target}", src(f"model.layers.{i}.mlp.down_proj", 24),
                   src("", 20), COLUMN)
            for i in range(LAYERS)
            for target in ("mlp.proj", "attention.dense")
        ))  # fmt: skip

    plan = planned(family_with(change), write(tmp_path / "hf", MINI, addresses(SHAPES)))
    text = problems(plan.errors)
    assert "used twice, by transformer.layers.{0..2}.attention.dense" in text
    assert "unmapped  model.layers.{0..2}.self_attn.o_proj.weight" in text


def test_rows_that_no_rule_uses(tmp_path):
    def half(layer):
        rows = parts(src(f"model.layers.{layer}.mlp.gate_up_proj", 40), a=20, b=20)
        return Linear(f"transformer.layers.{layer}.mlp.fc", select(rows, "a"), 24, COLUMN)

    def change(rules, config):
        return rules.replace(*map(half, range(LAYERS)))

    plan = planned(family_with(change), write(tmp_path / "hf", MINI, addresses(SHAPES)))
    text = problems(plan.errors)
    assert "rows 20 to 40 of model.layers.{0..2}.mlp.gate_up_proj are used nowhere" in text
    assert "transformer.layers.{0..2}.mlp.fc.weight: would be [20, 24]; the reader" in text


def test_targets_the_reader_does_not_know_or_lacks(tmp_path):
    def change(rules, config):
        kept = {name: rule for name, rule in rules.items() if name != "transformer.ln_f"}
        return Rules(*kept.values(), Linear("extra", src("model.norm", 24), 1, COLUMN))

    plan = planned(family_with(change), write(tmp_path / "hf", MINI, addresses(SHAPES)))
    details = {(f.subject, f.detail) for f in plan.errors if f.code == "schema"}
    assert {subject for subject, _ in details} == {"transformer.ln_f.weight", "extra.weight"}


# --- folding ---------------------------------------------------------------------------------


def finding(subject, detail="is odd", code="missing"):
    return Finding(Severity.ERROR, code, subject, detail)


def test_folding_keeps_what_differs():
    findings = [
        *(finding(f"model.layers.{i}.a.weight") for i in (0, 1, 2, 5)),
        finding("model.layers.1.b.weight"),
        finding("model.layers.0.a.weight", "is even"),
        *(finding(f"layers.{i}.c.weight", f"as layers.{i}.d") for i in (3, 4)),
        finding("lm_head.weight"),
        *(finding(f"consolidated.0{i}.pth") for i in (0, 1)),
    ]
    assert [(f.subject, f.detail, count) for f, count in fold(findings)] == [
        ("model.layers.{0..2,5}.a.weight", "is odd", 4),
        ("model.layers.1.b.weight", "is odd", 1),
        ("model.layers.0.a.weight", "is even", 1),
        ("layers.{3..4}.c.weight", "as layers.{3..4}.d", 2),
        ("lm_head.weight", "is odd", 1),
        ("consolidated.00.pth", "is odd", 1),  # names of files are not layers
        ("consolidated.01.pth", "is odd", 1),
    ]
    assert (ranges([4]), ranges([3, 1, 2]), ranges([0, 2, 3])) == ("4", "{1..3}", "{0,2..3}")
