"""The conformance tests catch every planted mistake, and name the tensor or key."""

import shutil
from pathlib import Path

import pytest
from testing.acme import BASES, MISTAKES, TINY

from phireg.testing import FamilyConformance, write_tiny_model
from phireg.testing.model import TinyModel

TESTS = [name for name in vars(FamilyConformance) if name.startswith("test_")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The tiny source of each base; a variant's is the same."""
    root = tmp_path_factory.mktemp("sources")
    return {base: write_tiny_model(BASES[base], TINY[base], root / base) for base in BASES}


def failures(family, tiny, source_dir, directory):
    """Messages of the inherited tests that fail, as they fail."""
    model = TinyModel(family, tiny, directory)
    model.source_dir = Path(shutil.copytree(source_dir, directory / "source"))
    case = type("TestCase", (FamilyConformance,), {"family": family, "tiny": tiny})()
    for name in TESTS:
        try:
            getattr(case, name)(model)
        except pytest.fail.Exception as failure:
            yield str(failure)
        except pytest.skip.Exception:
            pass


@pytest.mark.parametrize("base", BASES)
def test_the_bases_pass(base, sources, tmp_path):
    assert not list(failures(BASES[base], TINY[base], sources[base], tmp_path))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_caught_and_named(name, sources, tmp_path):
    planted = MISTAKES[name]
    messages = []
    for message in failures(planted.family(), TINY[planted.base], sources[planted.base], tmp_path):
        messages.append(message)
        if all(part in message for part in planted.message):
            return
    pytest.fail("no message names it:\n" + "\n".join(messages), pytrace=False)


def test_without_a_base_the_tensors_of_the_wrong_part_are_listed(sources, tmp_path):
    family = MISTAKES["halves_not_swapped"].family()
    family.base = None
    messages = "\n".join(failures(family, TINY["mini"], sources["mini"], tmp_path))
    assert "layer 0 mlp" in messages
    assert "transformer.layers.0.mlp.fc.weight  [testing/acme.py:" in messages
