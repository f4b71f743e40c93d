"""New plugin packages, from templates, for ``phireg new-plugin``.

Written with string.Template rather than with copier, so that the command needs no dependency.
"""

from __future__ import annotations

import importlib.util
import json
import keyword
import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any

from phireg import registry
from phireg.errors import OutputError, UsageError
from phireg.family import Family
from phireg.files.output import OutputDirectory
from phireg.hookspecs import API
from phireg.registry import AUTO, Candidate, FamilyChoice, Index

FILES = {
    "pyproject.toml": "pyproject.toml.template",
    "README.md": "README.md.template",
    "src/$module/__init__.py": "family.py.template",
    "tests/test_$module.py": "test_family.py.template",
}
"""The files of a package and their templates; both have ``$`` placeholders."""

# The form that PEP 503 normalizes to, so that pip, the entry point and --family agree on it.
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_HEADS, _KV_HEADS = 8, 2
_TINY_SIZES = {
    "hidden_size": _HEADS * 16,
    "num_hidden_layers": 3,
    "num_attention_heads": _HEADS,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_TINY_INTERMEDIATE_SIZE = 200
# Unlike every default, so that a table that ignores one of these keys fails the tests.
_UNUSUAL_VALUES = {"rope_theta": 5000.0, "rope_embedding_base": 5000, "rms_norm_eps": 1e-4}


@dataclass(frozen=True, slots=True)
class PluginPackage:
    """A package that was written."""

    module: str
    base: Candidate
    directory: Path
    files: tuple[str, ...]  # relative to the directory


def new_plugin(name: str, base: str, directory: Path | None = None) -> PluginPackage:
    """Write an installable package whose family derives from ``base``, an installed one."""
    installed = registry.index()
    choice = registry.load(base, installed)
    _check_name(name, installed)
    target = Path(name) if directory is None else directory
    if os.path.lexists(target):
        raise OutputError(
            f"{target} exists already; nothing was written",
            hint="choose another directory with --directory, or move it away.",
        )
    values = _values(name, choice)
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
    return PluginPackage(values["module"], choice.candidate, target, tuple(contents))


def _check_name(name: str, installed: Index) -> None:
    """Refuse a name that pip, Python or the registry would confuse with another one."""
    if not _NAME.fullmatch(name):
        suggestion = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        usable = _NAME.fullmatch(suggestion) is not None
        raise UsageError(
            f"'{name}' cannot name a distribution, a family and a module",
            hint="use lower-case letters, digits and single hyphens, beginning with a letter"
            f"{f'; perhaps {suggestion}' if usable else ''}.",
        )
    module = name.replace("-", "_")
    hint = f"choose another name, e.g. {name}-family."
    if name == AUTO:
        raise UsageError("--family auto has a meaning already", hint=hint)
    if keyword.iskeyword(module) or keyword.issoftkeyword(module):
        raise UsageError(f"'{module}' is a Python keyword", hint=hint)
    if offers := installed.get(name):
        offer = offers[0]
        if offer.distribution == name:
            hint += f" If it is an earlier version of yours: pip uninstall {name}"
        raise UsageError(
            f"a family '{name}' is offered already, by {offer.distribution} {offer.version}",
            hint=hint,
        )
    spec = importlib.util.find_spec(module)
    # A folder without an __init__.py in the current directory has a spec without an origin.
    if module in sys.stdlib_module_names or (spec is not None and spec.origin is not None):
        raise UsageError(f"there is a module '{module}' already", hint=hint)
    if any(True for _ in metadata.distributions(name=name)):
        raise UsageError(f"a distribution '{name}' is installed already", hint=hint)


def _values(name: str, choice: FamilyChoice) -> dict[str, str]:
    """Return the values of the templates' placeholders."""
    base = choice.candidate
    location = re.fullmatch(r"([\w.]+):(\w+)", base.value)
    if location is None:
        raise UsageError(
            f"family '{base.name}' is at {base.value}, which no import statement can name",
            hint="derive from it by hand: BASE.derive(...).",
        )
    requirements = [f"phireg>={metadata.version('phireg')}"]
    if base.distribution not in ("phireg", "unknown"):
        requirements.append(f"{base.distribution}>={base.version}")
    tiny = _tiny_config(choice.family)
    literals = {k: json.dumps(v) if isinstance(v, str) else repr(v) for k, v in tiny.items()}
    module = name.replace("-", "_")
    return {
        "name": name,
        "module": module,
        "test_class": "".join(part.capitalize() for part in module.split("_")),
        "api": str(API),
        "base": base.name,
        "base_module": location[1],
        "base_attribute": location[2],
        "dependencies": ", ".join(f'"{requirement}"' for requirement in requirements),
        "tiny": "\n        ".join(["{", *(f'"{k}": {v},' for k, v in literals.items())])
        + "\n    }",
    }


def _tiny_config(family: Family) -> dict[str, Any]:
    """Shrink the first published config, the family's or its base's, to small, awkward sizes."""
    while not family.published and family.base is not None:
        family = family.base
    config = dict(family.published[0].config) if family.published else {}
    # FamilyConformance adds these itself, and its model is float32.
    for key in ("architectures", "model_type", "torch_dtype"):
        config.pop(key, None)
    grouped = config.get("num_key_value_heads") != config.get("num_attention_heads")
    inner = [key for key in config if key.endswith("intermediate_size")] or ["intermediate_size"]
    return {
        **config,
        **_TINY_SIZES,
        "num_key_value_heads": _KV_HEADS if grouped else _HEADS,
        **dict.fromkeys(inner, _TINY_INTERMEDIATE_SIZE),
        **{key: value for key, value in _UNUSUAL_VALUES.items() if key in config},
    }
