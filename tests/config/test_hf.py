"""A config.json that remembers what was read."""

import pytest

from phireg.config.hf import HFConfig


def test_get_reaches_into_blocks():
    hf = HFConfig({"a": 1, "block": {"inner": {"x": [2]}}, "text": "t"})
    assert hf.get("a") == 1
    assert hf.get("block.inner.x") == [2]
    assert hf.get("block") == {"inner": {"x": [2]}}
    for absent in ("b", "block.y", "block.inner.x.y", "text.length", "a.b"):
        assert hf.get(absent) is None


@pytest.mark.parametrize("falsy", [0, False, "", [], {}])
def test_only_null_counts_as_absent(falsy):
    hf = HFConfig({"key": falsy, "null": None})
    assert hf.get("key") == falsy
    assert [hf.has(key) for key in ("key", "null", "missing")] == [True, False, False]
    assert [hf.is_null(key) for key in ("key", "null", "missing")] == [False, True, False]


def test_unread_lists_the_other_keys():
    hf = HFConfig({"z": 1, "a": 2, "null": None, "used": 3})
    hf.get("used")
    assert hf.unread() == ("z", "a"), "in file order; null is no value"
    hf.has("z")
    assert hf.unread() == ("a",)


def test_a_block_read_in_part_counts_leaf_by_leaf():
    hf = HFConfig({"rope": {"type": "su", "beta": 1, "deep": {"x": 1, "y": 2}}, "map": {"a": {}}})
    assert hf.has("rope"), "this does not read it"
    assert hf.unread() == ("rope", "map")
    hf.get("rope.type")
    hf.get("rope.deep.x")
    assert hf.looked_into("rope") and not hf.looked_into("map") and not hf.looked_into("ro")
    assert hf.unread() == ("rope.beta", "rope.deep.y", "map")
    hf.get("rope")
    assert hf.unread() == ("map",)


@pytest.mark.parametrize(
    ("data", "architectures", "model_type"),
    [
        ({"architectures": ["A", "B"], "model_type": "phi3"}, ("A", "B"), "phi3"),
        ({}, (), ""),
        ({"architectures": None, "model_type": None}, (), ""),
        ({"architectures": "A", "model_type": ""}, (), ""),
        ({"architectures": []}, (), ""),
    ],
)
def test_names_of_the_model(data, architectures, model_type):
    hf = HFConfig(data)
    assert (hf.architectures, hf.model_type) == (architectures, model_type)
