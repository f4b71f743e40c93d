"""docs/checkpoint-config.md lists every field any family writes, and no other."""

from pathlib import Path

import pytest
from family_checks import write_sparse
from phi3_models import source_shapes
from test_auto import PUBLISHED

import phireg
from phireg import registry

DOC = Path(__file__).parents[2] / "docs" / "checkpoint-config.md"
FAMILIES = ("phi2", "phi3-mini", "phi3-small", "phi3-medium", "phi3.5-moe")


def documented():
    """Fields and the families their row names."""
    section = DOC.read_text().split("## Fields")[1].split("## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert all(len(row) == 5 for row in rows)
    fields = {}
    for field, families, meaning, read_by, _ in rows:
        assert field.strip() not in fields
        assert meaning.strip() and read_by.strip()
        named = FAMILIES if families.strip() == "all" else families.strip().split(", ")
        fields[field.strip().strip("`")] = set(named)
    return fields


def decided_by_phireg(tmp_path):
    """The fields the plan adds to a family's own, blocks key by key."""
    source = write_sparse(tmp_path / "hf", PUBLISHED, source_shapes(PUBLISHED))
    plan = phireg.plan(source, qformat="int8_wo")
    own = produced(plan.chosen.family)
    fields = set()
    for key, value in plan.config.items():
        if isinstance(value, dict):
            fields |= {f"{key}.{inner}" for inner in value}
        elif key not in own:
            fields.add(key)
    return fields


def produced(family):
    """Every key the family's table can write, whatever the model."""
    return {key for entry in family.config_fields() for key in entry.to}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_documented_fields_are_those_that_are_written(tmp_path, name):
    written = produced(registry.load(name).family) | decided_by_phireg(tmp_path)
    assert {field for field, families in documented().items() if name in families} == written


@pytest.mark.parametrize("name", ["phi3-medium", "phi3.5-mini", "phi4", "phi4-mini"])
def test_phi3s_architecture_has_one_table(name):
    """So that what the page says of phi3-mini holds for them."""
    assert registry.load(name).family.steps == registry.load("phi3-mini").family.steps


def test_only_known_families_are_named():
    assert set().union(*documented().values()) == set(FAMILIES)
