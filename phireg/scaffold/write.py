"""Writing a new plugin package: its files appear together, or not at all."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any

from phireg import registry
from phireg.errors import OutputError, UsageError
from phireg.files.output import OutputDirectory
from phireg.hookspecs import API
from phireg.registry import Candidate, Chosen, Index
from phireg.scaffold.names import check_name, module_name
from phireg.scaffold.tiny import tiny_config

FILES = {
    "pyproject.toml": "pyproject.toml.template",
    "README.md": "README.md.template",
    "src/$module/__init__.py": "family.py.template",
    "tests/test_$module.py": "test_family.py.template",
}
"""Each file of a package and the template it is made from; both have ``$`` placeholders."""


@dataclass(frozen=True, slots=True)
class Scaffold:
    """A package that was written.

    Attributes:
        name: of the distribution and its family.
        module: of the module that defines it.
        base: the family it derives from, and who offers that.
        directory: where the package lies.
        files: its files, relative to the directory.
    """

    name: str
    module: str
    base: Candidate
    directory: Path
    files: tuple[str, ...]


def new_plugin(name: str, base: str, directory: Path | None = None) -> Scaffold:
    """Write an installable package whose family derives from an installed one.

    Args:
        name: of the distribution and its family, e.g. ``acme-phi``.
        base: the family to derive from, or ``distribution:family``.
        directory: to create; by default one called ``name`` in the current directory.

    Raises:
        UsageError: the name is malformed or taken, or the base cannot be imported by one name.
        PluginError: the base is unknown, ambiguous or broken.
        OutputError: the directory exists or cannot be written.
    """
    installed = registry.index()
    chosen = registry.load(base, installed)
    check_name(name, installed)
    target = Path(name) if directory is None else directory
    if os.path.lexists(target):
        raise OutputError(
            f"{target} exists already; nothing was written",
            hint="name another one with --directory, or move it away.",
        )
    values = _values(name, chosen, installed)
    templates = resources.files("phireg.scaffold") / "templates"
    contents = {
        Template(path).substitute(values): Template(
            (templates / template).read_text(encoding="utf-8")
        ).substitute(values)
        for path, template in FILES.items()
    }
    with OutputDirectory(target, overwrite=False, required_bytes=0) as unfinished:
        for path, content in contents.items():
            file = unfinished / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    return Scaffold(name, module_name(name), chosen.candidate, target, tuple(contents))


def _values(name: str, chosen: Chosen, installed: Index) -> dict[str, str]:
    base = chosen.candidate
    place = re.fullmatch(r"([\w.]+):(\w+)", base.value)
    if place is None:
        raise UsageError(
            f"family '{base.name}' is at {base.value}, which one import statement cannot name",
            hint="derive from it by hand: BASE.derive(...).",
        )
    phireg = metadata.version("phireg")
    requirements = [f"phireg>={phireg}"]
    if base.distribution not in ("phireg", "unknown"):
        requirements.append(f"{base.distribution}>={base.version}")
    module = module_name(name)
    return {
        "name": name,
        "module": module,
        "test_class": "".join(part.capitalize() for part in module.split("_")),
        "api": str(API),
        "base": base.name,
        "base_module": place[1],
        "base_attribute": place[2],
        "phireg": phireg,
        "dependencies": ", ".join(f'"{requirement}"' for requirement in requirements),
        "tiny": _literal(tiny_config(chosen.family, installed)),
    }


def _literal(config: Mapping[str, Any]) -> str:
    """A dictionary as the body of a test class spells it, a key per line."""
    lines = [f"    {_spelt(key)}: {_spelt(value)}," for key, value in config.items()]
    return textwrap.indent("\n".join(["{", *lines, "}"]), "    ").lstrip()


def _spelt(value: Any) -> str:
    """A JSON value in Python, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Mapping):
        items = (f"{_spelt(key)}: {_spelt(inner)}" for key, inner in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spelt, value))}]"
    return repr(value)
