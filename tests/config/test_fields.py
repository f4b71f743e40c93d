"""The field table: what each kind of entry produces and what it reports."""

import inspect
import math
import re

import pytest

from phireg.config.common import CONSTANTS, dimensions
from phireg.config.fields import (
    ConfigError,
    FieldTable,
    boolean,
    check,
    const,
    derive,
    factors,
    field,
    ignore,
    integer,
    number,
    positive,
    refuse,
    text,
    when,
)
from phireg.config.hf import HFConfig
from phireg.findings import Severity

HUGE = 10**400
NAN, INF = math.nan, math.inf


def run(data, *entries):
    """The fields, and the findings as (severity, subject, detail)."""
    result = FieldTable(*entries).translate(HFConfig(data))
    assert all(finding.code == "config" for finding in result.findings)
    found = [(f.severity.value, f.subject, f.detail) for f in result.findings]
    assert result.ok == ("error" not in {severity for severity, _, _ in found})
    return result.fields, found


# Kinds


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (integer(), 1, 1),
        (integer(0, 5), 0, 0),
        (integer(0, 5), 5, 5),
        (number, -2, -2.0),
        (number, 2.5, 2.5),
        (positive, 1e-5, 1e-5),
        (boolean, False, False),
        (text, "", ""),
        (factors, [1, 1.05], [1.0, 1.05]),
    ],
)
def test_kinds_accept(kind, value, wanted):
    result = kind(value)
    assert result == wanted
    assert type(result) is type(wanted)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (integer(), True, "whole number"),
        (integer(), 32.0, "whole number"),
        (integer(), "32", "whole number"),
        (integer(), 0, "from 1 to"),
        (integer(0, 5), -1, "from 0 to 5"),
        (integer(0, 5), 6, "from 0 to 5"),
        (integer(), HUGE, "from 1 to 16777216"),
        (number, True, "finite number"),
        (number, "1", "finite number"),
        (number, NAN, "finite number"),
        (number, INF, "finite number"),
        (number, HUGE, "finite number"),
        (positive, 0, "above zero"),
        (positive, -1.5, "above zero"),
        (positive, -HUGE, "finite number"),
        (boolean, 1, "true or false"),
        (boolean, "true", "true or false"),
        (text, 1, "string"),
        (factors, [], "list of numbers"),
        (factors, "1,2", "list of numbers"),
        (factors, {"0": 1}, "list of numbers"),
        (factors, [1, None], "finite number"),
        (factors, [1, True], "finite number"),
        (factors, [1, 0], "above zero"),
    ],
)
def test_kinds_refuse(kind, value, says):
    with pytest.raises(ValueError, match=says):
        kind(value)
    fields, found = run({"key": value}, field("key", kind=kind))
    assert fields == {}
    ((severity, subject, detail),) = found
    assert (severity, subject) == ("error", "key")
    assert says in detail
    assert "found" in detail
    assert len(detail) < 200, "a value of any length is shown short"


# Entries


def test_const_is_always_its_value():
    assert run({}, const("architecture", "PhiForCausalLM")) == (
        {"architecture": "PhiForCausalLM"},
        [],
    )


@pytest.mark.parametrize(
    "entry", [const("block", {"x": []}), field("block", kind=text, default=[])]
)
def test_a_result_does_not_share_its_values_with_the_table(entry):
    table = FieldTable(entry)
    first = table.translate(HFConfig({})).fields["block"]
    kept = type(first)(first)
    first.clear() if first else first.append("changed")
    assert table.translate(HFConfig({})).fields["block"] == kept


def test_field_takes_the_source_key_or_another_name():
    data = {"hidden_size": 6, "n_layer": 2}
    entries = field("hidden_size", kind=integer()), field("n_layer", kind=integer(), to="layers")
    assert run(data, *entries) == ({"hidden_size": 6, "layers": 2}, [])


def test_field_reaches_into_blocks():
    entry = field("rope.theta", kind=number, to="base")
    assert run({"rope": {"theta": 5}}, entry) == ({"base": 5.0}, [])


@pytest.mark.parametrize("data", [{}, {"a": None}, {"a": None, "b": None}])
def test_a_required_field_is_missing_when_absent_or_null(data):
    fields, found = run(data, field("a", "b", "c.d", kind=integer()))
    assert fields == {}
    assert found == [("error", "a", "missing (or spelt b, c.d)")]


def test_one_spelling_has_no_others_to_name():
    assert run({}, field("a", kind=text))[1] == [("error", "a", "missing")]


@pytest.mark.parametrize("default", [7, None, lambda fields: fields["x"] + 4])
def test_default(default):
    entries = const("x", 3), field("a", kind=integer(), default=default)
    assert run({}, *entries)[0]["a"] == (None if default is None else 7)
    assert run({"a": 9}, *entries)[0]["a"] == 9


def test_null_may_mean_something_else_than_absence():
    entry = field("n", kind=integer(), default=2, null=None)
    assert run({}, entry)[0] == {"n": 2}
    assert run({"n": None}, entry)[0] == {"n": None}
    assert run({"n": 5}, entry)[0] == {"n": 5}
    assert run({"n": None}, field("n", kind=integer(), default=2))[0] == {"n": 2}


def test_a_default_from_a_field_that_failed_adds_no_second_error():
    entries = (
        field("heads", kind=integer()),
        field("kv_heads", kind=integer(), default=lambda fields: fields["heads"]),
    )
    assert run({}, *entries) == ({}, [("error", "heads", "missing")])


def test_a_default_may_say_why_there_is_none():
    def impossible(fields):
        raise ConfigError("7 cannot be halved")

    entry = field("a", kind=integer(), default=impossible)
    assert run({}, entry) == ({}, [("error", "a", "7 cannot be halved")])


def test_several_spellings_must_agree():
    entry = field("rope_parameters.rope_theta", "rope_theta", kind=number, to="base")
    assert run({"rope_theta": 1e4}, entry)[0] == {"base": 1e4}
    same = {"rope_theta": 10000, "rope_parameters": {"rope_theta": 10000.0}}
    assert run(same, entry) == ({"base": 1e4}, [])
    other = {"rope_theta": 10000, "rope_parameters": {"rope_theta": 500}}
    fields, found = run(other, entry)
    assert fields == {}
    assert found == [("error", "rope_parameters.rope_theta", "is 500, but rope_theta is 10000")]


def test_a_null_spelling_does_not_disagree():
    entry = field("a", "b", kind=integer())
    assert run({"a": None, "b": 3}, entry) == ({"a": 3}, [])


def test_via_translates_and_names_what_it_knows():
    entry = field("act", kind=text, via={"silu": "swiglu", "gelu_new": "gelu"})
    assert run({"act": "silu"}, entry)[0] == {"act": "swiglu"}
    assert run({"act": "relu"}, entry)[1] == [
        ("error", "act", "'relu' is not supported; supported: silu, gelu_new")
    ]


def test_derive_sees_the_fields_and_the_source():
    entry = derive("c", lambda fields, hf: fields["a"] * hf.get("b"), "a * b")
    assert run({"b": 5}, const("a", 3), entry) == ({"a": 3, "c": 15}, [])


def test_derive_may_say_why_it_cannot():
    def head_size(fields, hf):
        raise ConfigError("hidden_size 7 cannot be divided by 2 heads")

    fields, found = run({}, derive("head_size", head_size, "hidden / heads"))
    assert fields == {}
    assert found == [("error", "head_size", "hidden_size 7 cannot be divided by 2 heads")]


@pytest.mark.parametrize(
    "entry",
    [
        derive("b", lambda fields, hf: fields["a"], "a"),
        check("b", lambda fields, hf: f"saw {fields['a']}"),
    ],
    ids=["derive", "check"],
)
def test_what_lacks_a_field_is_skipped_only_if_that_was_reported(entry):
    assert run({}, field("a", kind=integer()), entry) == ({}, [("error", "a", "missing")])
    # With nothing else wrong, the table itself is: silence would leave the field out unnoticed.
    fields, found = run({}, entry)
    assert fields == {}
    assert found == [("error", "b", "needs 'a', which no entry above makes")]


def test_check_reports_with_its_severity():
    def check_window(fields, hf):
        return None if hf.get("window") is None else "is not carried over"

    for severity in Severity:
        entry = check("window", check_window, severity=severity)
        assert run({"window": 5}, entry)[1] == [(severity.value, "window", "is not carried over")]
        assert run({}, entry)[1] == []


def test_refuse():
    entry = refuse("qk_norm", unless=[False], why="the reader has none")
    for accepted in ({}, {"qk_norm": None}, {"qk_norm": False}):
        assert run(accepted, entry) == ({}, [])
    assert run({"qk_norm": True}, entry)[1] == [
        ("error", "qk_norm", "is True: the reader has none")
    ]


def test_when_takes_one_branch():
    def long_rope(hf):
        return hf.has("factors")

    entry = when(
        long_rope,
        field("factors", kind=factors),
        const("kind", "long"),
        otherwise=[const("kind", "plain")],
    )
    assert run({}, entry)[0] == {"kind": "plain"}
    assert run({"factors": [2]}, entry)[0] == {"factors": [2.0], "kind": "long"}
    assert set(entry.to) == {"factors", "kind"}


def test_keys_of_the_branch_not_taken_are_unread():
    def never(hf):
        return False

    entry = when(never, field("factors", kind=factors))
    assert [subject for _, subject, _ in run({"factors": [1]}, entry)[1]] == ["factors"]


# The table


def test_an_unknown_key_is_a_warning_and_an_ignored_one_is_not():
    fields, found = run({"a": 1, "strange": 2}, ignore("a", "not_there", why="training only"))
    assert fields == {}
    assert found == [("warning", "strange", "is not known to this family and has no effect here")]


def test_an_unknown_key_in_a_block_that_is_read_is_an_error():
    data = {"rope": {"type": "su", "mystery": {"deep": 1}}}
    found = run(data, field("rope.type", kind=text))[1]
    assert [(severity, subject) for severity, subject, _ in found] == [("error", "rope.mystery")]


def test_an_unknown_block_is_one_warning():
    data = {"auto_map": {"AutoConfig": "x.y", "AutoModel": "x.z"}}
    assert [(s, k) for s, k, _ in run(data)[1]] == [("warning", "auto_map")]


def test_a_value_where_a_block_is_read_is_an_error():
    data = {"rope": "su"}
    found = run(data, field("rope.type", kind=text, default="none"))[1]
    assert [(severity, subject) for severity, subject, _ in found] == [("error", "rope")]


def test_a_whole_block_may_be_ignored():
    assert run({"auto_map": {"AutoConfig": "x.y"}}, ignore("auto_map", why="no code is run")) == (
        {},
        [],
    )


def test_null_is_not_unread():
    assert run({"nothing": None}) == ({}, [])


def test_what_was_read_before_does_not_hide_unknown_keys():
    """Other families look at the config first, to say whether it is theirs."""
    hf = HFConfig({"strange": 1})
    hf.get("strange")
    assert [f.subject for f in FieldTable().translate(hf).findings] == ["strange"]


def test_all_problems_are_reported_together():
    entries = (
        field("a", kind=integer()),
        field("b", kind=text),
        field("c", kind=boolean),
        refuse("d", unless=[], why="no"),
    )
    found = run({"b": 1, "c": True, "d": 1, "e": 1}, *entries)[1]
    assert [(severity, subject) for severity, subject, _ in found] == [
        ("error", "a"),
        ("error", "b"),
        ("error", "d"),
        ("warning", "e"),
    ]


def yes(hf):
    return True


@pytest.mark.parametrize(
    "build",
    [
        lambda: FieldTable(const("a", 1), field("x", kind=text, to="a")),
        lambda: FieldTable(const("a", 1), when(yes, const("a", 2))),
        lambda: when(yes, const("a", 1), const("a", 2)),
        lambda: when(yes, otherwise=[const("a", 1), const("a", 2)]),
        lambda: FieldTable().replace(const("a", 1), const("a", 2)),
        # A block of entries is replaced as a whole, or not at all.
        lambda: FieldTable(when(yes, const("a", 1), const("b", 1))).replace(const("a", 2)),
    ],
)
def test_a_target_has_one_producer(build):
    with pytest.raises(ValueError, match="a has two producers") as caught:
        build()
    assert len(re.findall(r"config/test_fields\.py:\d+", str(caught.value))) == 2


def test_replace_keeps_the_place_of_what_it_replaces():
    table = FieldTable(
        const("a", 1), derive("b", lambda f, hf: f["a"] + 1, "a + 1"), ignore("x", why="old")
    )
    changed = table.replace(const("c", 3), const("a", 10), ignore("y", why="new"))
    result = changed.translate(HFConfig({"x": 1, "y": 1}))
    assert (result.fields, result.findings) == ({"a": 10, "b": 11, "c": 3}, ())
    assert table.translate(HFConfig({})).fields == {"a": 1, "b": 2}, "the base stays as it was"


def test_describe_is_a_line_for_every_entry():
    def long_rope(hf):
        return True

    table = FieldTable(
        const("architecture", "X"),
        field("a", "b", kind=text, to="c"),
        derive("d", lambda f, hf: 1, "hidden / heads"),
        check("window", lambda f, hf: None),
        refuse("e", unless=[0], why="no counterpart"),
        ignore("f", "g", why="training only"),
        when(long_rope, const("h", 1), otherwise=[const("h", 2)]),
    )
    assert table.describe() == (
        "architecture = 'X'",
        "c <- a | b",
        "d = hidden / heads",
        "checked: window",
        "e must be absent or one of [0]: no counterpart",
        "ignored, training only: f, g",
        "if long_rope: h = 1",
        "unless long_rope: h = 2",
    )


# Places


def line():
    return inspect.currentframe().f_back.f_lineno


def made_here(*lines):
    return [f"config/test_fields.py:{number}" for number in lines]


def test_a_finding_names_the_line_of_its_entry():
    start = line()
    table = FieldTable(
        field("a", kind=text),
        field(
            "b",
            kind=integer(),
        ),
        derive("c", lambda f, hf: f["b"], "b"),
        when(yes, const("d", 1), refuse("e", unless=[], why="no counterpart")),
        check("d", lambda f, hf: "is odd"),
        *dimensions(),
    )
    result = table.translate(HFConfig({"a": "x", "b": "x", "e": 1, "unknown": 2, "head_dim": 4}))
    found = {finding.subject: finding.where for finding in result.findings}
    at = made_here(start + 3, start + 8, start + 9, start + 10)
    assert [found[key] for key in ("b", "e", "d", "hidden_size")] == at
    assert found["unknown"] == ""


def test_what_an_entry_lacks_has_its_place_too():
    table = FieldTable(when(yes, derive("a", lambda f, hf: f["b"], "b")))
    (finding,) = table.translate(HFConfig({})).findings
    assert "needs 'b'" in finding.detail
    assert [finding.where] == made_here(line() - 3)


def test_the_entries_that_may_produce_a_key():
    table = FieldTable(
        const("a", 1), when(yes, const("b", 1), otherwise=[when(yes, const("b", 2))])
    )
    assert [entry.doc for entry in table.producing("b")] == ["b = 1", "b = 2"]
    assert [entry.where for entry in table.producing("b")] == made_here(line() - 3, line() - 3)
    assert table.producing("c") == ()


def test_a_shared_entry_is_where_it_stands():
    assert all(re.fullmatch(r"config/common\.py:\d+", entry.where) for entry in CONSTANTS)
    assert len({entry.where for entry in CONSTANTS}) == len(CONSTANTS)
