"""Converted tiny models, made once, and phireg run inside this process."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from run.tiny import SOURCES, converted

from phireg.cli import app

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function from a family to its source model, tokenizer, source and checkpoint (TP 2)."""
    cache = {}

    def make(name):
        if name not in cache:
            base = tmp_path_factory.mktemp(name)
            model, tokenizer = SOURCES[name](base / "source")
            ckpt = converted(base / "source", base / "ckpt", tp_size=2)
            cache[name] = SimpleNamespace(
                model=model, tokenizer=tokenizer, source=base / "source", ckpt=ckpt
            )
        return cache[name]

    return make


@pytest.fixture
def altered(made, tmp_path):
    """A copy of the phi3 checkpoint to change."""
    return shutil.copytree(made("phi3").ckpt, tmp_path / "altered")


@pytest.fixture
def run():
    """`phireg run ...`; the result's `.stdout`, `.stderr` and `.exit_code`."""

    def invoke(*args, stdin=b""):
        words = ["run", *map(str, args), "--device", "cpu"]
        return CliRunner().invoke(app, words, input=stdin, prog_name="phireg")

    return invoke


@pytest.fixture
def document(run):
    """The document of `phireg run ... --json`."""

    def invoke(*args, **options):
        result = run(*args, "--json", **options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke
