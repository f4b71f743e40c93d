"""The source archive and the wheel: a registry would take them, and they are whole."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.fresh_environment import FreshEnvironment

pytestmark = pytest.mark.slow

IN_THE_ARCHIVE = {
    *("README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "docs/index.md"),
    *("tests/conftest.py", "tests/helpers/by_hand.py", "benchmarks/convert.py"),
}


def test_a_registry_would_take_them(archives):
    command = [sys.executable, "-m", "twine", "check", "--strict", *archives]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_source_archive_is_whole(archives):
    with tarfile.open(archives[0]) as archive:
        names = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    assert names >= IN_THE_ARCHIVE
    assert not any(name.endswith(".pyc") for name in names)


def test_the_wheel_works_without_the_clone(archives, tmp_path):
    environment = FreshEnvironment(tmp_path / "environment")
    environment.install(archives[1])
    (tmp_path / "elsewhere").mkdir()
    where = {"cwd": tmp_path / "elsewhere"}
    (model,) = environment.site_packages.glob("phireg_plugins/phi2/demo")
    assert {path.name for path in model.iterdir()} >= {"card.json", "heldback.jsonl"}
    options = ("--model-dir", model)
    environment.check("phireg", "convert", *options, "--output-dir", "ckpt", **where)
    options = (*options, "--quick", "--report", "page.html")
    environment.check("phireg", "verify", "ckpt", *options, **where)
    environment.check("phireg", "new-plugin", "acme", "--from", "phi3-mini", **where)
