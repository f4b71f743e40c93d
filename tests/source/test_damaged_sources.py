"""Every damage of a source is one error that names it and says what to do; nothing is executed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.damage import DAMAGES, Damage
from helpers.tiny_phi3 import make_tiny_phi3

import phireg
from phireg.errors import PhiregError, SourceError
from phireg.files.json import read_json_object
from phireg.findings import Severity
from phireg.source.readings import open_source

pytestmark = pytest.mark.hostile("damaged models")


def params(stage: str):
    return [pytest.param(damage, id=damage.name) for damage in DAMAGES if damage.stage == stage]


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    make_tiny_phi3(directory)
    return directory


def test_the_undamaged_checkpoint_has_no_findings(model: Path):
    assert not open_source(model).findings
    assert not phireg.plan(model).findings


@pytest.mark.parametrize("damage", params("source"))
def test_source_damage_is_one_clear_error(damage: Damage, model: Path):
    damage.apply(model)
    descriptors = open_files()
    with pytest.raises(SourceError) as caught:
        open_source(model)
        read_json_object(model / "config.json")
    message = caught.value.message
    assert caught.value.exit_code == 3
    assert str(model) in message
    assert damage.named in message
    assert caught.value.hint
    assert len(message) < 6000
    message.encode()  # it can be printed
    assert not (model / "executed").exists()
    assert open_files() <= descriptors  # those of earlier tests may be closed meanwhile


@pytest.mark.parametrize("damage", params("plan"))
def test_plan_damage_is_left_to_the_plan(damage: Damage, model: Path):
    damage.apply(model)
    open_source(model)
    try:
        findings = phireg.plan(model).findings
    except PhiregError as error:
        assert error.exit_code == 3
        assert error.hint
        assert damage.named in str(error)
    else:
        errors = [finding for finding in findings if finding.severity is Severity.ERROR]
        assert any(damage.named in f"{error.subject} {error.detail}" for error in errors)
