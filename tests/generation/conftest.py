"""Converted tiny models, made once, and phireg run inside this process."""

import json
import shutil
from types import SimpleNamespace

import pytest
from helpers.command_line import run_phireg
from helpers.tokenized_models import SOURCES, converted


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A function from a family to its source model, tokenizer, source and checkpoint."""
    cache = {}

    def make(family, tp_size=2):
        if family not in cache:
            source = tmp_path_factory.mktemp(family) / "source"
            cache[family] = (*SOURCES[family](source), source)
        model, tokenizer, source = cache[family]
        checkpoint = source.parent / f"tp{tp_size}"
        if not checkpoint.exists():
            converted(source, checkpoint, tp_size)
        return SimpleNamespace(
            model=model, tokenizer=tokenizer, source=source, checkpoint=checkpoint
        )

    return make


@pytest.fixture
def altered(models, tmp_path):
    """A copy of the phi3 checkpoint to change."""
    return shutil.copytree(models("phi3").checkpoint, tmp_path / "altered")


@pytest.fixture
def run():
    """`phireg run ...`; the result's `.stdout`, `.stderr` and `.exit_code`."""

    def invoke(*args, stdin=b""):
        return run_phireg("run", *args, "--device", "cpu", stdin=stdin)

    return invoke


@pytest.fixture
def document(run):
    """The document of `phireg run ... --json`."""

    def invoke(*args, **options):
        result = run(*args, "--json", **options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke
