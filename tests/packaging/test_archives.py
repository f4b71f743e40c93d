"""The source archive and the wheel: a registry would take them, and they are whole."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.fresh_environment import FreshEnvironment, build_wheel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".git", "__pycache__", ".*_cache", ".hypothesis", "build", "*.egg-info", "phireg-demo")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
IN_THE_ARCHIVE = {
    *("README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "docs/index.md"),
    *("tests/conftest.py", "tests/helpers/by_hand.py", "benchmarks/convert.py"),
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive, and the wheel that is built from it and not from the clone."""
    place = tmp_path_factory.mktemp("archives")
    clone = tmp_path_factory.mktemp("checkout") / "clone"  # a build writes where it builds
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*LEFT_OUT))
    command = [sys.executable, "-c", BUILD, place]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (source,) = place.glob("*.tar.gz")
    return source, build_wheel(source, place)


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
    output = environment.check("phireg", "demo", "phi2", **where)
    assert "the model's summary" in output
    (model,) = environment.site_packages.glob("phireg_plugins/phi2/demo")
    options = ("--model-dir", model, "--quick", "--report", "page.html")
    environment.check("phireg", "verify", "phireg-demo/phi2", *options, **where)
    environment.check("phireg", "new-plugin", "acme", "--from", "phi3-mini", **where)
