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
    return Family(
        name=name,
        architectures=("AcmeForCausalLM",),
        model_types=("acme",),
        steps=steps,
        api=api,
        **more,
    )


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


def test_a_family_answers_with_its_steps():
    acme = family(Base())
    fields = acme.config_fields().translate(HF).fields
    assert fields == {"architecture": "Base"}
    assert rules_of(acme) == "base"
    assert acme.quant_rules({}, "FP8").linears == ("base FP8",)


def test_the_steps_may_be_one_namespace_per_hook():
    @hookimpl
    def phireg_config_fields():
        return FieldTable()

    @hookimpl
    def phireg_weight_rules():
        return Rules()

    @hookimpl
    def phireg_quant_rules(config):
        return QuantRules(tuple(config))

    acme = family(
        SimpleNamespace(phireg_config_fields=phireg_config_fields),
        SimpleNamespace(phireg_weight_rules=phireg_weight_rules),
        SimpleNamespace(phireg_quant_rules=phireg_quant_rules, phireg_plugins=SimpleNamespace()),
    )
    assert acme.quant_rules({"a": 1}, "FP8").linears == ("a",)


# What is refused


@pytest.mark.parametrize("mark", [hookimpl, lambda function: function])
def test_a_misspelt_hook_is_found_and_the_nearest_named(mark):
    class Misspelt(Base):
        @mark
        def phireg_weigth_rules(self, config, hf):
            return Rules()

    error = refused(Misspelt())
    assert "phireg_weigth_rules" in error.message
    assert re.search(rf"{HERE}:\d+", error.message)
    assert "phireg_weight_rules" in error.hint


def test_a_marked_function_that_resembles_no_hook():
    class Odd(Base):
        @hookimpl
        def tokenizer(self):
            return None

    error = refused(Odd())
    assert "'tokenizer'" in error.message
    assert all(hook in error.hint for hook in HOOKS)


def test_an_unmarked_hook():
    class Unmarked(Base):
        def phireg_weight_rules(self, config, hf):  # unmarked
            return Rules()

    error = refused(Unmarked())
    assert f"({HERE}:{line_of('unmarked')})" in error.message
    assert "@hookimpl" in error.hint


def test_an_unknown_argument():
    class Unknown(Base):
        @hookimpl
        def phireg_weight_rules(self, config, tp_size):
            return Rules()

    error = refused(Unknown())
    assert "'tp_size'" in error.message
    assert "config, hf" in error.hint


def test_catch_all_arguments():
    class CatchAll(Base):
        @hookimpl
        def phireg_weight_rules(self, **config):
            return Rules()

    assert "'config'" in refused(CatchAll()).message


def test_an_argument_with_a_default():
    class Default(Base):
        @hookimpl
        def phireg_weight_rules(self, config, hf=None):
            return Rules()

    assert "'hf' of 'phireg_weight_rules'" in refused(Default()).message


def test_a_step_without_hooks():
    assert "SimpleNamespace" in refused(Base(), SimpleNamespace(helper=len)).message


def test_a_hook_without_implementation():
    class Part:
        @hookimpl
        def phireg_config_fields(self):
            return FieldTable()

        @hookimpl(wrapper=True)
        def phireg_quant_rules(self):
            return (yield)

    assert "phireg_weight_rules, phireg_quant_rules" in refused(Part()).message


def test_a_wrapper_that_does_not_yield():
    class Wrong:
        @hookimpl(wrapper=True)
        def phireg_weight_rules(self):
            return Rules()

    assert "phireg_weight_rules" in refused(Base(), Wrong()).message


@pytest.mark.parametrize(("api", "upgrade"), [(API + 1, "phireg"), (API - 1, "the plugin")])
def test_another_api_number(api, upgrade):
    with pytest.raises(PluginError) as caught:
        family(Base(), api=api)
    assert f"API {api};" in caught.value.message
    assert caught.value.hint.startswith(f"upgrade {upgrade},")


# Errors in hooks


@pytest.mark.parametrize("wrong", [{}, (), "rules"])
def test_a_wrong_type(wrong):
    class Wrong(Base):
        @hookimpl
        def phireg_weight_rules(self):
            return wrong

    with pytest.raises(PluginError) as caught:
        family(Wrong()).weight_rules({}, HF)
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


def test_a_variant_replaces_one_step_and_inherits_the_rest():
    base = family(Base())
    variant = base.derive("acme-2", Replaces())
    assert rules_of(variant) == "derived"
    assert variant.quant_rules({}, "FP8").linears == ("base FP8",)
    assert rules_of(base) == "base", "the base means the same as before"
    assert (variant.name, base.name) == ("acme-2", "acme")
    assert variant.architectures == base.architectures
    assert variant.model_types == base.model_types


def test_a_variant_amends_with_a_wrapper():
    base = family(Base())
    assert rules_of(base.derive("acme-2", Amends())) == "base+"
    assert rules_of(base) == "base"


def test_later_steps_wrap_earlier_ones():
    base = family(Base()).derive("one", Amends("1")).derive("two", Amends("2"))
    assert rules_of(base) == "base12"


def test_a_replacement_is_not_amended_by_what_it_replaces():
    """BASE's own wrapper belongs to BASE's answer, which the variant does not want."""
    amended = family(Base()).derive("one", Amends())
    assert rules_of(amended) == "base+"
    assert rules_of(amended.derive("two", Replaces())) == "derived"
    assert rules_of(amended.derive("two", Replaces()).derive("three", Amends("!"))) == "derived!"


def test_a_variant_that_forgets_to_return_does_not_get_the_bases_answer():
    class Forgets:
        @hookimpl
        def phireg_weight_rules(self):
            Rules(Norm("ln", src("lost", 6)))

    with pytest.raises(PluginError, match="NoneType"):
        rules_of(family(Base()).derive("acme-2", Forgets()))


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


def test_the_same_step_may_stand_twice():
    step = Amends()
    assert rules_of(family(Base()).derive("one", step).derive("two", step)) == "base++"


def test_a_variant_is_considered_by_auto_only_when_it_can_be_told_apart():
    model = PublishedModel("acme/model", {"hidden_size": 6})
    base = family(Base(), published=(model,), tell_apart=lambda hf: None, demo="acme:demo")
    assert base.auto
    assert base.demo == "acme:demo"
    plain = base.derive("plain")
    assert (plain.auto, plain.published, plain.tell_apart) == (False, (), None)
    assert plain.demo is None
    assert base.derive("own", demo="own:demo").demo == "own:demo"
    known = base.derive("known", tell_apart=lambda hf: "no", published=(model,))
    assert known.auto
    assert known.published == (model,)
    assert known.tell_apart(HF) == "no"


# Which models a family takes


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["AcmeForCausalLM"], "model_type": "acme"},
        {"architectures": ["AcmeForCausalLM"]},
        {"architectures": ["Other", "AcmeForCausalLM"]},
        {"model_type": "acme"},
        {},
    ],
)
def test_a_family_takes_its_own_models(config):
    assert family(Base()).refusal(HFConfig(config)) is None


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        ({"architectures": ["Other"], "model_type": "acme"}, "Other"),
        ({"architectures": ["A", "B"]}, "A / B"),
        ({"architectures": ["AcmeForCausalLM"], "model_type": "acme_v"}, "'acme_v'"),
        ({"model_type": "other"}, "'other'"),
    ],
)
def test_a_family_refuses_others_with_the_reason(config, culprit):
    assert culprit in family(Base()).refusal(HFConfig(config))


def test_hooks_see_neither_ranks_nor_tensors():
    arguments = [set(inspect.signature(getattr(Steps, hook)).parameters) for hook in HOOKS]
    assert set.union(*arguments) == {"self", "config", "hf", "scheme"}
