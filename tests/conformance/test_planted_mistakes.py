"""The conformance tests catch every planted mistake, and say where in the plugin it is."""

import re
import shutil
from pathlib import Path

import pytest
from conformance.acme import BASES, MISTAKES, TINY

from phireg.testing import FamilyConformance
from phireg.testing.model import TinyModel
from phireg.testing.tiny import write_tiny_model

TESTS = [name for name in vars(FamilyConformance) if name.startswith("test_")]
PLACE = re.compile(r"conformance/acme\.py:(\d+)")


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
def test_the_bases_are_right(base, sources, tmp_path):
    assert not list(failures(BASES[base], TINY[base], sources[base], tmp_path))


@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_caught_and_located(name, sources, tmp_path):
    planted = MISTAKES[name]
    said = []
    for message in failures(planted.family(), TINY[planted.base], sources[planted.base], tmp_path):
        said.append(message)
        named = {int(line) for line in PLACE.findall(message)}
        if all(words in message for words in planted.says) and named & set(planted.lines):
            return
    pytest.fail("no message says what and where:\n" + "\n".join(said), pytrace=False)


def test_there_are_enough():
    weights = [m for m in MISTAKES.values() if hasattr(m.step, "phireg_weight_rules")]
    assert len(weights) >= 20
