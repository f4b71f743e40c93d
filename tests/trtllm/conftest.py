"""A small converted checkpoint, and an installed builder that only pretends."""

import json
import sys
from pathlib import Path

import pytest
from helpers.tiny_phi3 import make_tiny_phi3

import phireg


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    make_tiny_phi3(directory / "model")
    (directory / "model" / "tokenizer.json").write_text("{}")
    for ranks in (1, 2):
        phireg.convert(phireg.plan(directory / "model", tp_size=ranks), directory / f"ckpt{ranks}")
    return directory


@pytest.fixture
def model(checkpoints):
    return checkpoints / "model"


@pytest.fixture
def checkpoint(checkpoints):
    return checkpoints / "ckpt1"


@pytest.fixture
def split(checkpoints):
    """For two ranks."""
    return checkpoints / "ckpt2"


class Fake:
    """The pretending builder: its directory, what it recorded, and how it is to behave."""

    def __init__(self, directory, monkeypatch):
        self.directory = directory
        self.monkeypatch = monkeypatch
        self.program = directory / "trtllm-build"
        text = Path(__file__).with_name("builder.py").read_text()
        self.program.write_text(text.replace("PYTHON", sys.executable, 1))
        self.program.chmod(0o755)
        monkeypatch.setenv("FAKE_RECORD", str(directory))
        # Nothing else: an environment that has a real builder must not be asked.
        monkeypatch.setenv("PATH", str(directory))

    def behave(self, **variables):
        for name, value in variables.items():
            self.monkeypatch.setenv(f"FAKE_{name.upper()}", str(value))

    def fail(self, text):
        """Let it end with 1 after printing a text."""
        (self.directory / "failure.txt").write_text(text)
        self.behave(mode="failure.txt")

    @property
    def arguments(self):
        return json.loads((self.directory / "arguments.json").read_text())


@pytest.fixture
def fake(tmp_path, monkeypatch):
    directory = tmp_path / "bin"
    directory.mkdir()
    return Fake(directory, monkeypatch)
