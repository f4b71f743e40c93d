"""Dividing experts over ranks, against slices of a numpy array."""

import numpy as np
import pytest
from naive import gather

from phireg.api import COLUMN, COPY, ROW, Experts, LayoutError, Linear, Norm, Rules, fuse, src
from phireg.layout.ranks import Ranks, held, tp_sizes, undivided

EXPERTS, INNER, HIDDEN = 6, 4, 3


def fc(experts=EXPERTS):
    return Experts(
        "fc",
        [fuse(up=src(f"{e}.w3", INNER), gate=src(f"{e}.w1", INNER)) for e in range(experts)],
        HIDDEN,
        COLUMN,
    )


def proj():
    return Experts("proj", [src(f"{e}.w2", HIDDEN) for e in range(EXPERTS)], INNER, ROW)


UP = np.arange(EXPERTS * INNER).reshape(EXPERTS, INNER)
GATE = 100 + UP
SOURCES = {f"{e}.w3": UP[e] for e in range(EXPERTS)} | {f"{e}.w1": GATE[e] for e in range(EXPERTS)}


@pytest.mark.parametrize(
    ("tp_size", "ep_size"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 3), (4, 2), (6, 6), (12, 3)]
)
def test_experts_are_shared_out_and_divided(tp_size, ep_size):
    rule, ranks = fc(), Ranks(tp_size, ep_size)
    divided, share = tp_size // ep_size, EXPERTS // ep_size
    for rank in range(tp_size):
        # TensorRT-LLM's Mapping: moe_tp_rank = tp_rank // moe_ep_size, moe_ep_rank = the rest.
        first, part = rank % ep_size * share, rank // ep_size
        inner = slice(part * INNER // divided, (part + 1) * INNER // divided)
        expected = [
            number
            for expert in range(first, first + share)
            for number in (*UP[expert, inner], *GATE[expert, inner])
        ]
        rows, cols = held(rule, rule.weight[0], rule.cols, ranks, rank)
        assert gather(rows, SOURCES).tolist() == expected
        assert cols == rule.cols
        assert {name for name, _ in rows.sources} == {
            f"{e}.{w}" for e in range(first, first + share) for w in ("w1", "w3")
        }


@pytest.mark.parametrize(("tp_size", "ep_size"), [(2, 1), (4, 2), (2, 2)])
def test_a_row_linear_of_experts_cuts_its_columns(tp_size, ep_size):
    rule = proj()
    divided, share = tp_size // ep_size, EXPERTS // ep_size
    for rank in range(tp_size):
        rows, cols = held(rule, rule.weight[0], rule.cols, Ranks(tp_size, ep_size), rank)
        first = rank % ep_size * share
        assert [s.source for s in rows.spans] == [f"{e}.w2" for e in range(first, first + share)]
        assert rows.length == share * HIDDEN
        (span,) = cols.spans
        width = INNER // divided
        assert (span.start, span.count) == (rank // ep_size * width, width)


def test_other_modules_are_divided_over_all_ranks():
    rule = Linear("qkv", src("x", 8), HIDDEN, COLUMN)
    (span,) = held(rule, rule.weight[0], rule.cols, Ranks(4, 2), 3)[0].spans
    assert (span.start, span.count) == (6, 2)
    whole = Norm("norm", src("n", 8))
    assert held(whole, whole.weight[0], None, Ranks(4, 2), 3) == (whole.weight[0], None)


def test_sizes_that_work():
    rules = Rules(fc(), proj(), Linear("qkv", src("x", 12), HIDDEN, COLUMN))
    assert tp_sizes(rules) == [1, 2, 4]
    assert tp_sizes(rules, 3) == [3, 6, 12]
    assert tp_sizes(rules, 4) == []


def test_what_is_not_divided_is_said_once_for_all_experts():
    parts = [(rule.target, part.name) for rule, part in undivided(Rules(fc(), proj()), Ranks(3))]
    assert parts == [("fc", "up"), ("fc", "gate"), ("proj", "rows")]


@pytest.mark.parametrize(("tp_size", "ep_size"), [(4, 4), (3, 2)])
def test_experts_that_cannot_be_shared_out(tp_size, ep_size):
    rule = fc()
    with pytest.raises(LayoutError, match=str(ep_size)):
        held(rule, rule.weight[0], rule.cols, Ranks(tp_size, ep_size), 0)


@pytest.mark.parametrize(
    ("rows", "policy"),
    [([src("a", 4), src("b", 5)], COLUMN), ([], COLUMN), ([src("a", 4)], COPY)],
)
def test_experts_must_be_alike_and_divided(rows, policy):
    with pytest.raises(LayoutError):
        Experts("fc", rows, HIDDEN, policy)
