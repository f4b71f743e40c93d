"""What API number a plugin's source states, found by reading and not by importing it."""

from __future__ import annotations

import ast
import importlib.util
from importlib.machinery import PathFinder
from pathlib import Path

_DEEPEST = 8
"""How many derivations are followed; a circle ends here."""


def declared_api(value: str) -> int | None:
    """The API number of the family at ``module:attribute``, or None if the source does not tell.

    A family states it as a literal: ``FAMILY = Family(..., api=1)``. A derived one has that of its
    base, wherever the module imports it from: ``FAMILY = BASE.derive(...)``.
    """
    module, _, attribute = value.partition(":")
    try:
        return _api(module.strip(), attribute.strip(), _DEEPEST)
    except Exception:  # source of strangers: whatever is wrong with it, it tells nothing
        return None


def _api(module: str, attribute: str, depth: int) -> int | None:
    source = _source(module) if depth else None
    if source is None:
        return None
    body = ast.parse(source.read_bytes()).body
    for node in reversed(body):
        if isinstance(node, ast.Assign) and attribute in map(ast.unparse, node.targets):
            return _stated(node.value, module, depth)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == attribute and node.value:
            return _stated(node.value, module, depth)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    return _api(_absolute(node, module, source), alias.name, depth - 1)
    return None


def _stated(value: ast.expr, module: str, depth: int) -> int | None:
    if not isinstance(value, ast.Call):
        return None
    for keyword in value.keywords:
        if keyword.arg == "api":
            number = ast.literal_eval(keyword.value)
            return number if isinstance(number, int) else None
    called = value.func
    if isinstance(called, ast.Attribute) and called.attr == "derive":
        return _api(module, ast.unparse(called.value), depth - 1)
    return None


def _absolute(node: ast.ImportFrom, module: str, source: Path) -> str:
    if not node.level:
        return node.module or ""
    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _source(module: str) -> Path | None:
    """The file of a module. Only a top-level one is found without importing what it lies in."""
    top, *names = module.split(".")
    spec = importlib.util.find_spec(top)
    for name in names:
        if spec is None or spec.submodule_search_locations is None:
            return None
        top = f"{top}.{name}"
        spec = PathFinder.find_spec(top, spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
