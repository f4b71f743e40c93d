"""phireg's own archives, built once, and a tiny model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.fresh_environment import build_wheel

TINY = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 40, "vocab_size": 97, "max_position_embeddings": 64,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


ROOT = Path(__file__).parents[2]
LEFT_OUT = (
    *(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "build", "*.egg-info"),
    "phireg-demo",
)
BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """The source archive, and the wheel that is built from it and not from the clone."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # all processes of the session build once
    with FileLock(place / "archives.lock"):
        if not (place / "archives").exists():
            unfinished = tmp_path_factory.mktemp("archives")
            clone = tmp_path_factory.mktemp("checkout") / "clone"  # a build writes where it builds
            shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*LEFT_OUT))
            command = [sys.executable, "-c", BUILD, unfinished]
            done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            (source,) = unfinished.glob("*.tar.gz")
            build_wheel(source, unfinished)
            unfinished.rename(place / "archives")
    (source,) = (place / "archives").glob("*.tar.gz")
    (wheel,) = (place / "archives").glob("*.whl")
    return source, wheel


@pytest.fixture(scope="session")
def phireg_wheel(archives):
    return archives[1]


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory):
    from phireg_plugins.phi3_mini import FAMILY

    from phireg.testing import write_random_model

    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_random_model(FAMILY, TINY, directory)
    return directory
