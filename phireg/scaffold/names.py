"""Names a new plugin may have: one name serves as distribution, family and, adapted, as module."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from importlib import metadata

from phireg.errors import UsageError
from phireg.registry import AUTO, Index

# Normalized as PEP 503 has it: pip, the entry point and --family then agree on one spelling.
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def module_name(name: str) -> str:
    """The module that a plugin called ``name`` lies in: ``acme-phi`` in ``acme_phi``."""
    return name.replace("-", "_")


def check_name(name: str, installed: Index) -> None:
    """Refuse a name that pip, Python or the registry could not tell from another one.

    Args:
        name: of the new distribution and its family.
        installed: the families there are.

    Raises:
        UsageError: the name is malformed, or taken.
    """
    if not _NAME.fullmatch(name):
        suggestion = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        usable = _NAME.fullmatch(suggestion) is not None
        raise UsageError(
            f"'{name}' cannot name a distribution, a family and a module",
            hint="a name is made of lower-case letters, digits and single hyphens, and begins with "
            f"a letter{f'; perhaps {suggestion}' if usable else ''}.",
        )
    module = module_name(name)
    if name == AUTO:
        raise UsageError("--family auto has a meaning already", hint="choose another name.")
    if keyword.iskeyword(module) or keyword.issoftkeyword(module):
        raise UsageError(f"'{module}' is a word of the Python language", hint=_another(name))
    if offers := installed.get(name):
        offer = offers[0]
        retry = f" If it is an earlier try of yours: pip uninstall {name}"
        raise UsageError(
            f"a family '{name}' is offered already, by {offer.distribution} {offer.version}",
            hint=_another(name) + (retry if offer.distribution == name else ""),
        )
    if module in sys.stdlib_module_names or _is_module(module):
        raise UsageError(
            f"there is a module '{module}' already, which the plugin's would hide or be hidden by",
            hint=_another(name),
        )
    if _is_distribution(name):
        raise UsageError(f"a distribution '{name}' is installed already", hint=_another(name))


def _another(name: str) -> str:
    return f"choose another name, e.g. {name}-family."


def _is_module(module: str) -> bool:
    found = importlib.util.find_spec(module)
    # A folder without an __init__.py in the current directory is no obstacle.
    return found is not None and found.origin is not None


def _is_distribution(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
