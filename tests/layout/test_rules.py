"""Rules: one per target, immutable, and each knows the line that made it."""

import inspect
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from phireg.layout.axes import fuse, pad, parts, replicable, src, tied
from phireg.layout.rules import Linear, Norm, Policy, Rules, Table, one_of
from phireg.layout.spans import LayoutError

COLUMN, ROW, COPY = Policy.COLUMN, Policy.ROW, Policy.COPY


def here(offset=0):
    """This file and the caller's line, as rules tell them."""
    line = inspect.currentframe().f_back.f_lineno + offset
    return f"{Path(__file__).parent.name}/{Path(__file__).name}:{line}"


def test_a_bias_and_alternatives_of_other_sources():
    rule = Linear("lm_head", pad(tied(src("embed", 7))), 4, COLUMN, bias=pad(src("lm_head", 7)))
    assert rule.weight[0].sources == (("embed", 7),)
    assert rule.bias[0].sources == (("lm_head", 7),)
    fused, separate = parts(src("qkv", 6), q=4, k=2), fuse(q=src("q", 4), k=src("k", 2))
    assert Linear("qkv", one_of(fused, separate), 4, COLUMN).weight == (fused, separate)


@pytest.mark.parametrize(
    ("rows", "bias"),
    [(one_of(src("a", 6), src("b", 7)), False), (one_of(), False), (src("a", 6), src("b", 7))],
)
def test_alternatives_and_bias_must_be_as_long_as_each_other(rows, bias):
    with pytest.raises(LayoutError):
        Linear("fc", rows, 4, COLUMN, bias=bias)


@pytest.mark.parametrize(
    "other",
    [
        fuse(q=src("q", 4), k=src("k", 4)),
        fuse(q=src("q", 6), k=src("k", 2), unit=2),
        replicable(fuse(q=src("q", 4), k=src("k", 4), unit=2), "k"),
        pad(fuse(q=src("q", 4), k=src("k", 4), unit=2)),
        src("whole", 8, unit=2),
    ],
    ids=["unit", "sizes", "replicable", "padded", "parts"],
)
def test_alternatives_must_be_divided_alike(other):
    """Otherwise the ranks of one source layout would hold other rows than those of the next."""
    canonical = fuse(q=src("a", 4), k=src("b", 4), unit=2)
    with pytest.raises(LayoutError):
        Linear("qkv", one_of(canonical, other), 4, COLUMN)


def test_rules_cannot_be_changed():
    drop = {"x": "reason"}
    rules = Rules(Norm("a", src("x", 3)), drop=drop)
    drop["y"] = "added later"
    assert dict(rules.drop) == {"x": "reason"}
    with pytest.raises(TypeError):
        rules["a"] = Norm("a", src("z", 3))
    with pytest.raises(TypeError):
        rules.drop["z"] = "no"
    with pytest.raises(FrozenInstanceError):
        rules["a"].target = "b"


def test_a_target_has_one_rule_and_both_places_are_named():
    first = Norm("a", src("x", 3))
    second = Norm("a", src("x", 3))
    assert first == second, "the place does not make rules differ"
    with pytest.raises(LayoutError) as caught:
        Rules(first, second)
    assert here(-5) in str(caught.value) and here(-4) in str(caught.value)


def test_replace_keeps_the_rest_and_the_order():
    rules = Rules(Norm("a", src("x", 3)), Norm("b", src("y", 3)), drop={"z": "why"})
    new = Norm("a", src("other", 3))
    replaced = rules.replace(new)
    assert list(replaced.values()) == [new, rules["b"]]
    assert replaced.drop == rules.drop
    assert rules["a"].weight == (src("x", 3),), "the original stays as it was"


def test_replace_takes_known_targets_once():
    rules = Rules(Norm("a", src("x", 3)))
    with pytest.raises(LayoutError, match="b, c"):
        rules.replace(Norm("b", src("x", 3)), Norm("c", src("x", 3)))
    with pytest.raises(LayoutError):
        rules.replace(Norm("a", src("y", 3)), Norm("a", src("z", 3)))


def test_where_survives_comprehensions_generators_and_helpers():
    listed = [Linear(f"fc{i}", src("x", 3), 2, COLUMN) for i in range(2)]
    assert {rule.where for rule in listed} == {here(-1)}
    tables = tuple(Table(f"t{i}", one_of(src("x", 3)), 2) for i in range(2))
    assert {rule.where for rule in tables} == {here(-1)}

    def helper(name):
        return Norm(name, src(name, 3))

    assert helper("n").where == here(-2)
