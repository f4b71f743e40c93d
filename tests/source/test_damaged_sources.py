"""Every damage that reading the directory must notice, and none that it must leave to the plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.damage import DAMAGES, Damage, make_tiny_phi3

from phireg.errors import SourceError
from phireg.files.json import read_json_object
from phireg.source.model import open_source


def params(stage: str):
    return [pytest.param(damage, id=damage.name) for damage in DAMAGES if damage.stage == stage]


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    make_tiny_phi3(directory)
    return directory


def test_names_are_unique_and_many():
    names = [damage.name for damage in DAMAGES]
    assert len(set(names)) == len(names) >= 60


def test_the_good_checkpoint_is_good(good: Path):
    source = open_source(good)
    assert not source.notes
    assert len(source.files) == 3
    assert read_json_object(good / "config.json")["hidden_size"] == 32


@pytest.mark.parametrize("damage", params("source"))
def test_source_damage_is_one_clear_error(damage: Damage, good: Path):
    damage.apply(good)
    descriptors = open_files()
    with pytest.raises(SourceError) as caught:
        open_source(good)
        read_json_object(good / "config.json")
    message = str(caught.value)
    assert re.search(damage.expect, message, re.IGNORECASE), message
    assert caught.value.exit_code == damage.exit_code
    assert str(good) in message
    assert len(message) < 6000
    message.encode()  # it can be printed
    assert not (good / "executed").exists()
    assert open_files() == descriptors


@pytest.mark.parametrize("damage", params("plan"))
def test_plan_damage_is_left_to_the_plan(damage: Damage, good: Path):
    before = contents(good)
    damage.apply(good)
    assert contents(good) != before
    open_source(good)
    read_json_object(good / "config.json")
