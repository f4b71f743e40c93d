"""The model card: what the hub's own library reads in it, and whom it belongs to."""

import json

import pytest
from helpers import tiny_models
from huggingface_hub import ModelCard

import phireg
from phireg.errors import OutputError

SOURCE_CARD = """\
---
license: mit
license_link: https://huggingface.co/microsoft/phi-2/resolve/main/LICENSE
language: [en]
---
# A model
license: gpl
"""


@pytest.fixture
def source(tmp_path):
    """As the hub's cache has it."""
    directory = tmp_path / "models--acme--tiny-phi" / "snapshots" / "0123abcd"
    directory.mkdir(parents=True)
    (directory / "README.md").write_text(SOURCE_CARD)
    return tiny_models.write("phi2", directory)


def weights(source, out, **options):
    plan = phireg.plan(source, target="hf-modelopt", qformat="fp8", dtype="bfloat16")
    return phireg.quantize(plan, out, **options)


@pytest.fixture
def statistics(source):
    import numpy as np

    from phireg.calibration.statistics import Statistics

    plan = phireg.plan(source, target="hf-modelopt", qformat="fp8", dtype="bfloat16")
    inputs = {m: np.ones(x.columns, np.float32) for x in plan.linears for m in x.sources}
    return Statistics(inputs, (), (), {})


def test_the_front_matter(tmp_path, source, statistics):
    weights(source, tmp_path / "out", statistics=statistics)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["license_link"].endswith("/LICENSE")
    assert data["base_model"] == "acme/tiny-phi" and data["base_model_relation"] == "quantized"
    assert set(data["tags"]) == {"phireg", "fp8", "modelopt"}
    assert "Not measured" in card.text and "`lm_head`" in card.text and "vLLM" in card.text
    manifest = json.loads((tmp_path / "out" / "phireg.json").read_text())
    assert "README.md" not in manifest["files"]


def test_a_plain_directory_claims_no_more_than_it_knows(tmp_path):
    source = tiny_models.write("phi2", tmp_path / "my | model")
    phireg.convert(phireg.plan(source, target="hf"), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"base_model", "license"}.isdisjoint(card.data.to_dict())
    assert "my \\| model" in card.text and "Quality" not in card.text
    phireg.convert(phireg.plan(source), tmp_path / "ranks")
    assert not (tmp_path / "ranks" / "README.md").exists()


def test_a_changed_card_is_never_replaced(tmp_path, source, statistics):
    out = tmp_path / "out"
    weights(source, out, statistics=statistics)
    weights(source, out, statistics=statistics, overwrite=True)
    card = out / "README.md"
    mine = card.read_text() + "My own words.\n"
    card.write_text(mine)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(OutputError):
        weights(source, out, statistics=statistics, overwrite=True)
    assert card.read_text() == mine
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.parametrize(
    "text", ["", "---\nlicense: [mit]\n---\n", "---\n" * 9, "---\nlicense: 'mit\"\n---\n", "\0\xff"]
)
def test_odd_cards_of_sources(tmp_path, text):
    source = tiny_models.write("phi2", tmp_path / "model")
    (source / "README.md").write_bytes(text.encode("latin-1"))
    phireg.convert(phireg.plan(source, target="hf"), tmp_path / "out")
    assert "license" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()


def test_a_source_card_elsewhere_is_not_read(tmp_path):
    source = tiny_models.write("phi2", tmp_path / "model")
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (source / "README.md").symlink_to(tmp_path / "secret")
    phireg.convert(phireg.plan(source, target="hf"), tmp_path / "out")
    assert "license" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
