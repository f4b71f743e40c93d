"""A good tiny model, and phireg run inside this process or as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import run_phireg
from helpers.tiny_phi3 import make_tiny_phi3

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(tmp_path):
    directory = tmp_path / "model"
    make_tiny_phi3(directory)
    return directory


@pytest.fixture
def run():
    """Run phireg in this process."""
    return run_phireg


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
