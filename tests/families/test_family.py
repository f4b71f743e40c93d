"""Families: refused constructions, hooks and their errors, derived variants."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from phireg.config.fields import FieldTable, const
from phireg.config.hf import HFConfig
from phireg.errors import PluginError
from phireg.family import Family, PublishedModel
from phireg.hookspecs import API, Steps, hookimpl
from phireg.layout.axes import parts, src
from phireg.layout.rules import Norm, QuantRules, Rules
from phireg.layout.spans import LayoutError

HERE = f"{Path(__file__).parent.name}/{Path(__file__).name}"
HF = HFConfig({})


class Base:
    @hookimpl
    def phireg_config_fields(self):
        return FieldTable(const("architecture", "Base"))

    @hookimpl
    def phireg_weight_rules(self, config, hf):
        return Rules(Norm("ln", src("base", config["hidden_size"])))

    @hookimpl
    def phireg_quant_rules(self, scheme):
        return QuantRules((f"base {scheme}",))


def family(*steps, name="acme", api=API, **more):
    names = {"architectures": ("AcmeForCausalLM",), "model_types": ("acme",)}
    return Family(name=name, steps=steps, api=api, **names, **more)


def rules_of(family):
    (norm,) = family.weight_rules({"hidden_size": 6}, HF).values()
    return norm.weight[0].sources[0][0]


def refused(*steps):
    with pytest.raises(PluginError) as caught:
        family(*steps)
    error = caught.value
    assert error.exit_code == 5
    assert "'acme'" in error.message
    return error


def line_of(needle):
    """The number of the line that ends with a marker comment."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {needle}")]
    return number


# Refused families


@pytest.mark.parametrize(
    ("hook", "function", "named", "hint"),
    [
        ("phireg_weigth_rules", lambda self, config: Rules(), "weigth", "phireg_weight_rules"),
        ("phireg_weigth_rules", hookimpl(lambda self: Rules()), "weigth", "phireg_weight_rules"),
        ("tokenizer", hookimpl(lambda self: None), "'tokenizer'", "phireg_quant_rules"),
        ("phireg_weight_rules", lambda self: Rules(), "phireg_weight_rules", "@hookimpl"),
        ("phireg_weight_rules", hookimpl(lambda self, tp_size: Rules()), "'tp_size'", "config, hf"),
        ("phireg_weight_rules", hookimpl(lambda self, **config: Rules()), "'config'", "config, hf"),
        ("phireg_weight_rules", hookimpl(lambda self, hf=None: Rules()), "'hf'", "default"),
    ],
    ids=[
        "misspelled",
        "misspelled-marked",
        "unknown",
        "unmarked",
        "argument",
        "catch-all",
        "default",
    ],
)
def test_a_wrong_hook_is_named_with_its_line(hook, function, named, hint):
    error = refused(type("Step", (Base,), {hook: function})())
    assert named in error.message
    assert f"({HERE}:{function.__code__.co_firstlineno})" in error.message
    assert hint in error.hint


class Part:
    @hookimpl
    def phireg_config_fields(self):
        return FieldTable()

    @hookimpl(wrapper=True)
    def phireg_quant_rules(self):
        return (yield)


class NoGenerator:
    @hookimpl(wrapper=True)
    def phireg_weight_rules(self):
        return Rules()


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ((Base(), SimpleNamespace(helper=len)), "SimpleNamespace"),
        ((Part(),), "phireg_weight_rules, phireg_quant_rules"),
        ((Base(), NoGenerator()), "phireg_weight_rules"),
    ],
    ids=["without-hooks", "hook-missing", "wrapper-without-yield"],
)
def test_steps_that_are_no_family(steps, named):
    assert named in refused(*steps).message


@pytest.mark.parametrize(("api", "upgrade"), [(API + 1, "phireg"), (API - 1, "the plugin")])
def test_another_api_number(api, upgrade):
    with pytest.raises(PluginError) as caught:
        family(Base(), api=api)
    assert f"API {api};" in caught.value.message
    assert caught.value.hint.startswith(f"upgrade {upgrade},")


# Errors in hooks


@pytest.mark.parametrize("wrong", [{}, (), "rules", None])
def test_a_wrong_type(wrong):
    """None as well: the base's answer must not stand in for a forgotten return."""

    class Wrong(Base):
        @hookimpl
        def phireg_weight_rules(self):
            return wrong

    with pytest.raises(PluginError) as caught:
        family(Base()).derive("acme-2", Wrong()).weight_rules({"hidden_size": 6}, HF)
    assert f"phireg_weight_rules returned {type(wrong).__name__}" in caught.value.message


def helper(config):
    return config["absent"]  # culprit


class Raises(Base):
    @hookimpl
    def phireg_weight_rules(self, config):
        return helper(config)

    @hookimpl
    def phireg_quant_rules(self, scheme):
        return QuantRules(re.compile(scheme).groups)  # in the library

    @hookimpl
    def phireg_config_fields(self):
        return FieldTable(const("a", 1), const("a", 2))  # in phireg


@pytest.mark.parametrize(
    ("call", "hook", "culprit"),
    [
        (lambda f: f.weight_rules({}, HF), "phireg_weight_rules", "culprit"),
        (lambda f: f.quant_rules({}, "("), "phireg_quant_rules", "in the library"),
        (lambda f: f.config_fields(), "phireg_config_fields", "in phireg"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_raising_hook_names_the_line_of_the_plugin(call, hook, culprit, wrapped):
    acme = family(Raises())
    if wrapped:
        acme = acme.derive("acme", *(Wraps(name) for name in HOOKS))
    with pytest.raises(PluginError) as caught:
        call(acme)
    assert hook in caught.value.message
    assert f"({HERE}:{line_of(culprit)})" in caught.value.message
    assert caught.value.__cause__ is not None


HOOKS = ("phireg_config_fields", "phireg_weight_rules", "phireg_quant_rules")


def Wraps(hook):  # noqa: N802
    """A step that passes the answer of one hook on."""

    @hookimpl(wrapper=True)
    def passes_on():
        return (yield)

    return SimpleNamespace(**{hook: passes_on})


def test_sizes_that_do_not_fit_are_no_defect_of_the_plugin():
    class Odd(Base):
        @hookimpl
        def phireg_weight_rules(self):
            return Rules(Norm("ln", parts(src("x", 5), a=2, b=2)))

    with pytest.raises(LayoutError):
        family(Odd()).weight_rules({}, HF)


# Derivation


class Replaces:
    @hookimpl
    def phireg_weight_rules(self):
        return Rules(Norm("ln", src("derived", 6)))


class Amends:
    def __init__(self, mark="+"):
        self.mark = mark

    @hookimpl(wrapper=True)
    def phireg_weight_rules(self, hf):
        rules = yield
        (norm,) = rules.values()
        name = norm.weight[0].sources[0][0]
        return rules.replace(Norm("ln", src(name + self.mark, 6)))


AMENDS = Amends()


def test_a_variant_replaces_one_step_and_inherits_the_rest():
    base = family(Base())
    variant = base.derive("acme-2", Replaces())
    assert rules_of(variant) == "derived"
    assert variant.config_fields().translate(HF).fields == {"architecture": "Base"}
    assert variant.quant_rules({}, "FP8").linears == ("base FP8",)
    assert rules_of(base) == "base", "the base means the same as before"
    assert (variant.name, base.name) == ("acme-2", "acme")
    assert variant.architectures == base.architectures
    assert variant.model_types == base.model_types


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([Amends("1"), Amends("2")], "base12"),
        ([AMENDS, AMENDS], "base++"),
        # The wrapper belongs to what was replaced.
        ([AMENDS, Replaces()], "derived"),
        ([AMENDS, Replaces(), Amends("!")], "derived!"),
    ],
)
def test_later_steps_wrap_or_replace_earlier_ones(steps, expected):
    variant = base = family(Base())
    for number, step in enumerate(steps):
        variant = variant.derive(f"acme-{number}", step)
    assert rules_of(variant) == expected
    assert rules_of(base) == "base"


def test_the_order_of_the_chain_cannot_be_turned_round():
    class First(Base):
        @hookimpl(tryfirst=True)
        def phireg_weight_rules(self):
            return Rules(Norm("ln", src("first", 6)))

    class Last:
        @hookimpl(trylast=True)
        def phireg_weight_rules(self):
            return Rules(Norm("ln", src("last", 6)))

    assert rules_of(family(First()).derive("acme-2", Last())) == "last"


def test_a_variant_is_considered_by_auto_only_when_it_can_be_told_apart():
    model = PublishedModel("acme/model", {"hidden_size": 6})
    base = family(Base(), published=(model,), tell_apart=lambda hf: None, demo="acme:demo")
    assert (base.auto, base.demo) == (True, "acme:demo")
    plain = base.derive("plain")
    assert (plain.auto, plain.published, plain.tell_apart, plain.demo) == (False, (), None, None)
    own = {"published": (model,), "demo": "own:demo"}
    known = base.derive("known", tell_apart=lambda hf: "no", **own)
    assert (known.auto, known.published, known.demo) == (True, (model,), "own:demo")
    assert known.tell_apart(HF) == "no"


# Models of a family


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        ({"architectures": ["Other", "AcmeForCausalLM"], "model_type": "acme"}, None),
        ({"architectures": ["AcmeForCausalLM"]}, None),
        ({"model_type": "acme"}, None),
        ({}, None),
        ({"architectures": ["Other"], "model_type": "acme"}, "Other"),
        ({"architectures": ["A", "B"]}, "A / B"),
        ({"architectures": ["AcmeForCausalLM"], "model_type": "acme_v"}, "'acme_v'"),
        ({"model_type": "other"}, "'other'"),
    ],
)
def test_a_family_refuses_other_models_with_the_reason(config, culprit):
    refusal = family(Base()).refusal(HFConfig(config))
    assert refusal is None if culprit is None else culprit in refusal


def test_hooks_see_neither_ranks_nor_tensors():
    arguments = [set(inspect.signature(getattr(Steps, hook)).parameters) for hook in HOOKS]
    assert set.union(*arguments) == {"self", "config", "hf", "scheme"}
