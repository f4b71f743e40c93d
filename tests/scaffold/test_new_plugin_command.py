"""phireg new-plugin: names, refusals, and files that appear together or not at all."""

import ast
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers.command_line import run_phireg
from packaging.requirements import Requirement

from phireg import registry
from phireg.scaffold import FILES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(run_phireg, "new-plugin")


def files(directory):
    return {
        str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file()
    }


def test_what_is_written(run, tmp_path):
    result = run("acme-phi-v2", "--from", "phi3-small", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    root = tmp_path / "acme-phi-v2"
    assert document["module"] == "acme_phi_v2"
    assert (document["base"], document["provided_by"]["distribution"]) == ("phi3-small", "phireg")
    assert files(root) == set(document["files"])
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["name"] == "acme-phi-v2"
    assert project["entry-points"]["phireg.families"] == {"acme-phi-v2": "acme_phi_v2:FAMILY"}
    (requirement,) = map(Requirement, project["dependencies"])
    assert requirement.name == "phireg"
    for name in ("src/acme_phi_v2/__init__.py", "tests/test_acme_phi_v2.py"):
        text = (root / name).read_text()
        ast.parse(text)
        assert "$" not in text
        assert max(map(len, text.splitlines())) <= 100
    assert "$" not in (root / "README.md").read_text()
    umask = os.umask(0)
    os.umask(umask)
    assert root.stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_text_names_the_next_commands(run):
    result = run("acme-phi", "--from", "phi3-mini", "--directory", "my plugins/one")
    assert result.exit_code == 0
    assert "pip install -e 'my plugins/one[testing]'" in result.output
    assert "pytest 'my plugins/one'" in result.output


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("Acme_Phi", "acme-phi"),
        ("acme--phi", "acme-phi"),
        ("4phi", "4phi"),
        ("-phi", "phi"),
        ("../phi", "phi"),
        ("phi3é", "phi3"),
        ("", "''"),
        ("auto", "auto"),
        ("class", "class"),
        ("match", "match"),
        ("json", "module 'json'"),
        ("torch", "module 'torch'"),
        ("phireg-plugins", "module 'phireg_plugins'"),
        ("phi3-mini", "phireg 0.1.0"),
    ],
)
def test_names_that_are_refused(run, tmp_path, name, named):
    result = run(name, "--from", "phi3-mini")
    assert result.exit_code == 2
    assert named in result.output
    assert "uninstall" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_no_module(run, tmp_path, monkeypatch):
    (tmp_path / "acme_folder_name").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert run("acme-folder-name", "--from", "phi3-mini", "--directory", "other").exit_code == 0


def test_an_unknown_base_is_answered_with_the_nearest(run, tmp_path):
    result = run("acme-phi", "--from", "phi3-mimi")
    assert result.exit_code == 5
    assert "'phi3-mini'" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_exists_is_left_alone(run, tmp_path, make):
    make(tmp_path / "acme-phi")
    before = sorted(tmp_path.rglob("*"))
    result = run("acme-phi", "--from", "phi3-mini")
    assert result.exit_code == 6
    assert "acme-phi exists" in result.output and "--directory" in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", range(len(FILES)))
def test_all_files_or_none(run, tmp_path, monkeypatch, number):
    """A disk that is full at any file leaves nothing."""
    written = []
    real = Path.write_text

    def full(path, *args, **options):
        if "unfinished" in path.parts:
            written.append(path)
            if len(written) > number:
                raise OSError(28, "No space left on device", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    result = run("acme-phi", "--from", "phi3-mini")
    assert result.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_no_import_names(run, tmp_path, monkeypatch):
    chosen = registry.load("phi3-mini")
    odd = replace(chosen, candidate=replace(chosen.candidate, value="phireg_plugins:x.FAMILY"))
    monkeypatch.setattr(registry, "load", lambda name, known: odd)
    result = run("acme-phi", "--from", "phi3-mini")
    assert result.exit_code == 2
    assert "phireg_plugins:x.FAMILY" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_a_third_party_becomes_a_requirement(run, tmp_path, monkeypatch):
    chosen = registry.load("phi3-mini")
    theirs = replace(chosen.candidate, distribution="acme-base", version="3.1", value="acme:FAM")
    monkeypatch.setattr(registry, "load", lambda name, known: replace(chosen, candidate=theirs))
    assert run("acme-phi", "--from", "acme-base:x").exit_code == 0
    project = tomllib.loads((tmp_path / "acme-phi" / "pyproject.toml").read_text())["project"]
    assert project["dependencies"][1:] == ["acme-base>=3.1"]
    assert (
        "from acme import FAM as BASE"
        in (tmp_path / "acme-phi/src/acme_phi/__init__.py").read_text()
    )
