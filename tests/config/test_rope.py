"""The entries all families share for rope, in the spellings of transformers 4 and 5."""

import pytest

from phireg.config.common import is_long_rope, rotary_dim, supported_rope
from phireg.config.fields import ConfigError, FieldTable
from phireg.config.hf import HFConfig


@pytest.mark.parametrize(
    ("data", "long"),
    [
        ({"rope_scaling": None}, False),
        ({"rope_scaling": {"type": "su"}}, True),
        ({"rope_parameters": {"rope_type": "longrope"}}, True),
        ({"rope_scaling": {"type": "su", "rope_type": "longrope"}}, True),
        ({"rope_scaling": {"type": "su"}, "rope_parameters": {"rope_type": "longrope"}}, True),
    ],
)
def test_one_type_under_one_or_two_names(data, long):
    """transformers 4.43 and later write both names into one block."""
    assert is_long_rope(HFConfig(data)) == long
    table = FieldTable(supported_rope("default", "longrope", "su"))
    assert table.translate(HFConfig(data)).findings == ()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"rope_scaling": {"type": "longrope", "rope_type": "default"}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "su"}, "rope_parameters": {"rope_type": "x"}}, ".rope_type"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn'"),
        ({"rope_scaling": {"type": 5}}, "'5'"),
        ({"rope_scaling": {"short_factor": [1]}}, "factors"),
    ],
)
def test_other_types_are_refused(data, named):
    table = FieldTable(supported_rope("default", "longrope", "su"))
    findings = table.translate(HFConfig(data)).findings
    assert any(f.subject == "rope_scaling" and named in f.detail for f in findings)


@pytest.mark.parametrize(
    ("head", "share", "rotated"), [(80, 0.4, 32), (96, 1.0, 96), (128, 0.75, 96)]
)
def test_rotary_dim(head, share, rotated):
    assert rotary_dim({"head_size": head, "rotary_pct": share}, HFConfig({})) == rotated


@pytest.mark.parametrize(
    ("head", "share"), [(80, 0.0), (10, 0.5), (80, 1.5), (80, 1e308), (7, 1.0)]
)
def test_heads_that_cannot_be_rotated_are_refused(head, share):
    with pytest.raises(ConfigError):
        rotary_dim({"head_size": head, "rotary_pct": share}, HFConfig({}))
