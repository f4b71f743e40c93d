"""A good tiny model, and phireg run inside this process or as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.tiny_phi3 import make_tiny_phi3

from phireg.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(tmp_path):
    directory = tmp_path / "model"
    make_tiny_phi3(directory)
    return directory


@pytest.fixture
def run():
    """Run phireg here; `.output` is stdout and stderr, `.exit_code` what the process would give."""

    def invoke(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="phireg")

    return invoke


@pytest.fixture
def spawn():
    """Run phireg as a process; keywords are subprocess.run's."""

    def start(*args, env=None, **options):
        command = [sys.executable, "-m", "phireg", *map(str, args)]
        options = {"capture_output": True, "text": True, "timeout": 60, "cwd": ROOT} | options
        if "stdout" in options or "stderr" in options:
            options.pop("capture_output")
        return subprocess.run(command, env=os.environ | (env or {}), **options)

    return start
