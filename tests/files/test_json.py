from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phireg.errors import SourceError
from phireg.files.json import parse_object, read_json_object

pytestmark = pytest.mark.hostile("JSON")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=5), st.booleans())
def test_valid_objects_come_back_as_they_are(value, ascii_only):
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def refusal(tmp_path, content, **options):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_json_object(path, **options)
    assert str(path) in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", ""),
        (b" \n", ""),
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b'{"a": 1}\n{"b": 2}', "line 2, column 1"),
        (b'{\n\n"a": "\xc3"}', "line 3"),
        (b'{"a": {"b": [{"c": 1, "c": 1}]}}', "'c'"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": -1e400}', "-1e400"),
        *((value, "") for value in (b'"text"', b"null", b"true", b"3", b"[]")),
        (b'{"a": "\\uD800"}', ""),
        (b'{"a": ["x", "\\udc00\\ud800"]}', ""),
        (b'{"a": "tab\there"}', "line 1"),
        (b'{"a":' * 100_000, ""),
    ],
)
def test_refusals(tmp_path, content, named):
    assert named in refusal(tmp_path, content)


def test_the_limit_is_a_limit(tmp_path):
    content = b'{"a": 1}'
    path = tmp_path / "c.json"
    path.write_bytes(content)
    assert read_json_object(path, limit=len(content)) == {"a": 1}
    refusal(tmp_path, content, limit=7)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(SourceError):
        read_json_object(tmp_path / "none.json")
    with pytest.raises(SourceError):
        read_json_object(tmp_path)
