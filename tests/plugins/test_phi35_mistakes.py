"""Mistakes with experts that the conformance tests must find and locate."""

from dataclasses import replace

import pytest
import torch
from phireg_plugins.phi35_moe import FAMILY as PHI35_MOE
from safetensors.torch import load_file, save_file
from unregistered import errors

from phireg.api import (
    COLUMN,
    ROW,
    Experts,
    Linear,
    every_linear,
    fuse,
    hookimpl,
    parts,
    select,
    src,
)
from phireg.testing.conformance import logits_problems
from phireg.testing.model import TinyModel

HIDDEN, INNER, EXPERTS = 24, 10, 3
TINY = {
    "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": INNER, "vocab_size": 31,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "rope_theta": 5000.0,
    "num_local_experts": EXPERTS, "router_jitter_noise": 0.3, "attention_bias": True,
    "lm_head_bias": True, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
MOE = "model.layers.0.block_sparse_moe"
MLP = "transformer.layers.0.mlp"


def experts(*halves, order=range(EXPERTS)):
    rows = [
        fuse(**{name: src(f"{MOE}.experts.{e}.{w}", INNER) for name, w in halves}) for e in order
    ]
    return Experts(f"{MLP}.fc", rows, HIDDEN, COLUMN)


MISTAKES = {
    "gate first": (
        experts(("gate", "w1"), ("up", "w3")),
        "row 0 of transformer.layers.0.mlp.fc.weight came from",
    ),
    "experts in another order": (
        experts(("up", "w3"), ("gate", "w1"), order=(1, 0, 2)),
        "layer 0 mlp",
    ),
    "down of another expert": (
        Experts(
            f"{MLP}.proj", [src(f"{MOE}.experts.{e}.w2", HIDDEN) for e in (0, 2, 1)], INNER, ROW
        ),
        "layer 0 mlp",
    ),
}


def with_rule(rule):
    class Step:
        @hookimpl(wrapper=True)
        def phireg_weight_rules(self):
            rules = yield
            return rules.replace(rule)

    return PHI35_MOE.derive("mistaken", Step())


def test_without_a_mistake_there_is_nothing(tmp_path):
    assert logits_problems(TinyModel(PHI35_MOE, TINY, tmp_path), 1) is None


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name, tmp_path):
    rule, part = MISTAKES[name]
    problems = logits_problems(TinyModel(with_rule(rule), TINY, tmp_path), 1)
    assert problems is not None
    assert part in problems, problems
    assert rule.where in problems, problems


def test_a_router_in_the_checkpoints_dtype_has_no_plan(tmp_path):
    """The reader wants it in float32; only a half-precision checkpoint shows the difference."""
    wrong = with_rule(Linear(f"{MLP}.router", src(f"{MOE}.gate", EXPERTS), HIDDEN, COLUMN))
    source = TinyModel(wrong, TINY, tmp_path).source_dir
    details = {subject: detail for _, subject, detail in errors(wrong, source, dtype="bfloat16")}
    assert details == {f"{MLP}.router.weight": "would be BF16; the reader expects F32"}


def test_experts_that_are_not_stacked_have_no_plan(tmp_path):
    """Rows of the right number, in the right order, and with two axes."""
    rows = {f"e{e}": src(f"{MOE}.experts.{e}.w2", HIDDEN) for e in range(EXPERTS)}
    wrong = with_rule(Linear(f"{MLP}.proj", fuse(**rows), INNER, ROW))
    problems = TinyModel(wrong, TINY, tmp_path).plan_problems(1)
    assert f"would be [{EXPERTS * HIDDEN}, {INNER}]; the reader expects" in problems


class EveryLinear:
    @hookimpl
    def phireg_quant_rules(self, config):
        return every_linear(config)


@pytest.mark.parametrize("qformat", ["int8_sq", "int8_wo"])
def test_experts_in_other_formats_have_no_plan(qformat, tmp_path):
    family = PHI35_MOE.derive("mistaken", EveryLinear())
    source = TinyModel(family, TINY, tmp_path).source_dir
    problems = {(code, subject) for code, subject, _ in errors(family, source, qformat=qformat)}
    assert problems == {("quant", f"{MLP}.fc"), ("quant", f"{MLP}.proj")}


def test_experts_of_one_source_module_have_no_scales_of_their_own(tmp_path):
    """The rows of every expert's w2 in one tensor, as no published model has them."""
    rows = src(f"{MOE}.experts.w2", EXPERTS * HIDDEN)
    cut = parts(rows, **{f"e{e}": HIDDEN for e in range(EXPERTS)})
    axes = [select(cut, f"e{e}") for e in range(EXPERTS)]
    down = [replace(axis, parts=(replace(axis.parts[0], name="down"),)) for axis in axes]
    family = with_rule(Experts(f"{MLP}.proj", down, INNER, ROW))
    source = TinyModel(PHI35_MOE, TINY, tmp_path / "model").source_dir
    tensors = load_file(source / "model.safetensors")
    names = [f"{MOE}.experts.{e}.w2.weight" for e in range(EXPERTS)]
    tensors[f"{MOE}.experts.w2.weight"] = torch.cat([tensors.pop(name) for name in names])
    save_file(tensors, source / "model.safetensors")
    assert errors(family, source) == []
    ((code, subject, detail),) = errors(family, source, qformat="fp8")
    assert (code, subject) == ("quant", f"{MLP}.proj") and "share" in detail
