"""pyproject.toml and setup.cfg: nothing forgotten, nothing that does not exist."""

import ast
import configparser
import re
import sys
from importlib import import_module
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
FOLDERS = {"phireg": "phireg", "phireg_plugins": "plugins"}

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def sources():
    return [path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")]


def test_every_package_is_packaged():
    packages = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    listed = SETUP["options"]["packages"].split()
    assert packages - set(listed) == set(), "setup.cfg must list every folder with an __init__.py"
    assert set(listed) - packages == set(), "setup.cfg lists folders that are no packages"
    assert listed == sorted(listed)


def test_every_module_lies_in_a_package():
    stray = [path for path in sources() if not (path.parent / "__init__.py").is_file()]
    assert stray == []


def test_data_files_exist():
    for package, names in SETUP["options.package_data"].items():
        top, *rest = package.split(".")
        for name in names.split():
            files = [*ROOT.joinpath(FOLDERS[top], *rest).glob(name)]
            assert files and all(path.is_file() for path in files), (package, name)


def test_python_versions_agree():
    supported = SpecifierSet(PROJECT["requires-python"])
    versions = [f"3.{minor}" for minor in range(6, 20) if supported.contains(f"3.{minor}.1")]
    assert versions == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    prefix = "Programming Language :: Python :: "
    named = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert named == versions
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py310"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == "3.10"


def test_entry_points_name_what_exists():
    groups = PROJECT["entry-points"].values()
    values = [value for group in groups for value in group.values()]
    for value in [*values, *PROJECT["scripts"].values()]:
        module, _, attribute = value.partition(":")
        assert hasattr(import_module(module), attribute), value


def names_of(requirements):
    """What is imported of the distributions that are required, where both have one name."""
    return {re.sub(r"[-.]", "_", Requirement(line).name).lower() for line in requirements}


def imported(path):
    """The top-level modules a file imports, and those among them it imports in functions only."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    always, lazily = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules = {node.module.split(".")[0]}
        else:
            continue
        (lazily if id(node) in inside else always).update(modules)
    return always, lazily


def test_what_is_imported_is_required():
    """Nothing works only because another package happens to bring it along.

    What an extra brings may be imported where it is needed: pytest in phireg.testing, and readers
    of data inside the functions that read. Triton is torch's own: its CUDA builds bring the release
    they were made with, and without one the two modules are never reached.
    """
    required = names_of(PROJECT["dependencies"]) | set(sys.stdlib_module_names) | set(FOLDERS)
    extras = PROJECT["optional-dependencies"]
    for path in sources():
        always, lazily = imported(path)
        testing = path.is_relative_to(ROOT / "phireg" / "testing")
        allowed = required | (names_of(extras["testing"]) if testing else set())
        if path.parent.name == "cuda" and path.stem != "fused":
            allowed |= {"triton"}
        if path.parent.name == "tensorrt" and path.name == "package.py":
            lazily -= {"tensorrt", "tensorrt_rtx_bindings"}  # of the extras of those names
        assert always - allowed == set(), path
        extra = names_of(extras["data"]) | names_of(extras["sentencepiece"])
        assert lazily - allowed - extra == set(), path
