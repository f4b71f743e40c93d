"""Converted demo models, made once; phireg summarize in this process; a fake backend."""

import json
from functools import partial

import pytest
from helpers.command_line import run_phireg
from summarization import fakes

import phireg
from phireg import demo
from phireg.generation import backend as protocol


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function from a family and a TP size to a float32 checkpoint of its demo model."""
    cache = {}

    def make(family, tp_size=1):
        if (family, tp_size) not in cache:
            path = tmp_path_factory.mktemp(family) / "ckpt"
            model = demo.find(family).directory
            phireg.convert(phireg.plan(model, dtype="float32", tp_size=tp_size), path)
            cache[family, tp_size] = path
        return cache[family, tp_size]

    return make


@pytest.fixture
def fake(monkeypatch):
    """The module of the backend `fake`, as new."""
    monkeypatch.setitem(protocol.BACKENDS, "fake", "summarization.fakes")
    monkeypatch.setattr(fakes, "CALLS", [])
    monkeypatch.setattr(fakes, "FAIL_AFTER", [None])
    monkeypatch.setattr(fakes, "NLL", [[0.5, 1.5]])
    return fakes


@pytest.fixture
def run():
    """`phireg summarize ...`; the result's `.stdout`, `.stderr` and `.exit_code`."""

    return partial(run_phireg, "summarize")


@pytest.fixture
def document(run):
    """The document of `phireg summarize ... --json`."""

    def invoke(*args):
        result = run(*args, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke
