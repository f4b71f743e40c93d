"""The field table: what each kind of entry produces and what it reports."""

import inspect
import math
import re

import pytest

from phireg.config.common import dimensions
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
    """Translate, and return the fields and the findings as (severity, subject)."""
    result = FieldTable(*entries).translate(HFConfig(data))
    assert all(finding.code == "config" and finding.detail for finding in result.findings)
    findings = [(finding.severity.value, finding.subject) for finding in result.findings]
    assert result.ok == ("error" not in {severity for severity, _ in findings})
    return result.fields, findings


# Kinds


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (integer(), 1, 1),
        (integer(0, 5), 0, 0),
        (integer(0, 5), 5, 5),
        (number, -2, -2.0),
        (positive, 1e-5, 1e-5),
        (boolean, False, False),
        (text, "", ""),
        (factors, [1, 1.05], [1.0, 1.05]),
    ],
)
def test_kinds_accept(kind, value, expected):
    result = kind(value)
    assert result == expected
    assert type(result) is type(expected)


REFUSED = {
    integer(): [True, 32.0, "32", 0, HUGE],
    integer(0, 5): [-1, 6],
    number: [True, "1", NAN, INF, HUGE],
    positive: [0, -1.5, -HUGE],
    boolean: [1, "true"],
    text: [1],
    factors: [[], "1,2", {"0": 1}, [1, None], [1, True], [1, 0]],
}


@pytest.mark.parametrize(
    ("kind", "value"), [(kind, value) for kind, values in REFUSED.items() for value in values]
)
def test_kinds_refuse(kind, value):
    with pytest.raises(ValueError):
        kind(value)
    result = FieldTable(field("key", kind=kind)).translate(HFConfig({"key": value}))
    assert result.fields == {}
    (finding,) = result.findings
    assert (finding.severity, finding.subject) == (Severity.ERROR, "key")
    assert len(finding.detail) < 200, "a value of any length is shown short"


# Entries


def impossible(*_):
    raise ConfigError("7 cannot be halved")


def long_rope(hf):
    return hf.has("factors")


THETA = field("rope_parameters.rope_theta", "rope_theta", kind=number, to="base")
ACT = field("act", kind=text, via={"silu": "swiglu", "gelu_new": "gelu"})
NULL = field("n", kind=integer(), default=2, null=None)
QK_NORM = refuse("qk_norm", unless=[False], why="the reader has none")
BRANCHES = when(
    long_rope,
    field("factors", kind=factors),
    const("kind", "long"),
    otherwise=[const("kind", "plain")],
)
ERROR, WARNING = "error", "warning"


@pytest.mark.parametrize(
    ("data", "entries", "fields", "findings"),
    [
        ({}, [const("architecture", "X")], {"architecture": "X"}, []),
        ({"hidden": 6}, [field("hidden", kind=integer())], {"hidden": 6}, []),
        ({"n_layer": 2}, [field("n_layer", kind=integer(), to="layers")], {"layers": 2}, []),
        ({"rope": {"theta": 5}}, [field("rope.theta", kind=number, to="base")], {"base": 5.0}, []),
        # required, absent or null
        ({}, [field("a", "b", "c.d", kind=integer())], {}, [(ERROR, "a")]),
        ({"a": None, "b": None}, [field("a", "b", kind=integer())], {}, [(ERROR, "a")]),
        # defaults
        ({}, [field("a", kind=integer(), default=7)], {"a": 7}, []),
        ({"a": 9}, [field("a", kind=integer(), default=7)], {"a": 9}, []),
        ({}, [field("a", kind=integer(), default=None)], {"a": None}, []),
        ({}, [const("x", 3), field("a", kind=integer(), default=lambda f: f["x"] + 4)],
         {"x": 3, "a": 7}, []),
        ({}, [field("h", kind=integer()), field("k", kind=integer(), default=lambda f: f["h"])],
         {}, [(ERROR, "h")]),
        ({}, [field("a", kind=integer(), default=impossible)], {}, [(ERROR, "a")]),
        # null may mean something else than absence
        ({}, [NULL], {"n": 2}, []),
        ({"n": None}, [NULL], {"n": None}, []),
        ({"n": 5}, [NULL], {"n": 5}, []),
        ({"n": None}, [field("n", kind=integer(), default=2)], {"n": 2}, []),
        # several spellings must agree
        ({"rope_theta": 1e4}, [THETA], {"base": 1e4}, []),
        ({"rope_theta": 10000, "rope_parameters": {"rope_theta": 1e4}}, [THETA], {"base": 1e4}, []),
        ({"rope_theta": 10000, "rope_parameters": {"rope_theta": 500}}, [THETA],
         {}, [(ERROR, "rope_parameters.rope_theta")]),
        ({"a": None, "b": 3}, [field("a", "b", kind=integer())], {"a": 3}, []),
        ({"act": "silu"}, [ACT], {"act": "swiglu"}, []),
        ({"act": "relu"}, [ACT], {}, [(ERROR, "act")]),
        ({"b": 5}, [const("a", 3), derive("c", lambda f, hf: f["a"] * hf.get("b"), "a * b")],
         {"a": 3, "c": 15}, []),
        ({}, [derive("head_size", impossible, "hidden / heads")], {}, [(ERROR, "head_size")]),
        ({}, [QK_NORM], {}, []),
        ({"qk_norm": None}, [QK_NORM], {}, []),
        ({"qk_norm": False}, [QK_NORM], {}, []),
        ({"qk_norm": True}, [QK_NORM], {}, [(ERROR, "qk_norm")]),
        # branches; keys of the one not taken are unread
        ({}, [BRANCHES], {"kind": "plain"}, []),
        ({"factors": [2]}, [BRANCHES], {"factors": [2.0], "kind": "long"}, []),
        ({"factors": [1]}, [when(lambda hf: False, field("factors", kind=factors))],
         {}, [(WARNING, "factors")]),
        # keys that no entry reads
        ({"a": 1, "strange": 2}, [ignore("a", "absent", why="training")], {},
         [(WARNING, "strange")]),
        ({"rope": {"type": "su", "mystery": {"deep": 1}}}, [field("rope.type", kind=text)],
         {"rope.type": "su"}, [(ERROR, "rope.mystery")]),
        ({"auto_map": {"AutoConfig": "x.y", "AutoModel": "x.z"}}, [], {}, [(WARNING, "auto_map")]),
        ({"rope": "su"}, [field("rope.type", kind=text, default="none")],
         {"rope.type": "none"}, [(ERROR, "rope")]),
        ({"auto_map": {"AutoConfig": "x.y"}}, [ignore("auto_map", why="no code is run")], {}, []),
        ({"nothing": None}, [], {}, []),
        # all problems together
        ({"b": 1, "c": True, "d": 1, "e": 1},
         [field("a", kind=integer()), field("b", kind=text), field("c", kind=boolean),
          refuse("d", unless=[], why="no")],
         {"c": True}, [(ERROR, "a"), (ERROR, "b"), (ERROR, "d"), (WARNING, "e")]),
    ],
)  # fmt: skip
def test_entries(data, entries, fields, findings):
    assert run(data, *entries) == (fields, findings)


@pytest.mark.parametrize(
    "entry", [const("block", {"x": []}), field("block", kind=text, default=[])]
)
def test_a_result_does_not_share_its_values_with_the_table(entry):
    table = FieldTable(entry)
    first = table.translate(HFConfig({})).fields["block"]
    kept = type(first)(first)
    first.clear() if first else first.append("changed")
    assert table.translate(HFConfig({})).fields["block"] == kept


@pytest.mark.parametrize(
    "entry",
    [
        derive("b", lambda fields, hf: fields["a"], "a"),
        check("b", lambda fields, hf: f"saw {fields['a']}"),
    ],
    ids=["derive", "check"],
)
def test_what_lacks_a_field_is_skipped_only_if_that_was_reported(entry):
    assert run({}, field("a", kind=integer()), entry) == ({}, [("error", "a")])
    # With nothing else wrong, the table itself is: silence would leave the field out unnoticed.
    assert run({}, entry) == ({}, [("error", "b")])


def test_check_reports_with_its_severity():
    def check_window(fields, hf):
        return None if hf.get("window") is None else "is not carried over"

    for severity in Severity:
        entry = check("window", check_window, severity=severity)
        assert run({"window": 5}, entry)[1] == [(severity.value, "window")]
        assert run({}, entry)[1] == []


# The table


def test_what_was_read_before_does_not_hide_unknown_keys():
    """Other families look at the config first, to say whether it is theirs."""
    hf = HFConfig({"strange": 1})
    hf.get("strange")
    assert [finding.subject for finding in FieldTable().translate(hf).findings] == ["strange"]


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
    with pytest.raises(ValueError, match=r"\ba\b") as caught:
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


# Places


def line():
    return inspect.currentframe().f_back.f_lineno


def lines_here(*lines):
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
    places = {finding.subject: finding.where for finding in result.findings}
    at = lines_here(start + 3, start + 8, start + 9, start + 10)
    assert [places[key] for key in ("b", "e", "d", "hidden_size")] == at
    assert places["unknown"] == ""


def test_the_entries_that_may_produce_a_key():
    table = FieldTable(
        const("a", 1), when(yes, const("b", 1), otherwise=[when(yes, const("b", 2))])
    )
    assert [entry.doc for entry in table.producing("b")] == ["b = 1", "b = 2"]
    assert [entry.where for entry in table.producing("b")] == lines_here(line() - 3, line() - 3)
    assert table.producing("c") == ()
