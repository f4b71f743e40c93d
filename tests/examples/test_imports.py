"""The example packages import phireg.api and nothing else of phireg."""

import ast

import pytest
from example_models import EXAMPLES

FILES = sorted(EXAMPLES.glob("phireg-*/src/*/*.py"))
ALLOWED = ("phireg.api", "phireg_phi4", "phireg_phi35", "collections.abc", "typing")
MODELS = ("torch", "transformers")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    names = [alias.name for node in imports for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert names
    for name in names:
        if name.startswith("phireg_plugins."):
            assert name.count(".") == 1, f"{name} is the inside of another plugin"
        elif path.name == "reference.py":
            assert name.partition(".")[0] in (*MODELS, "typing", "__future__"), name
        else:
            assert name in ALLOWED, name
