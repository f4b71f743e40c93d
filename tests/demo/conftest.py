"""The training scripts of the demo models, as modules."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "demo_models"


@pytest.fixture(scope="session")
def script():
    """Imports a script by name; they import each other as neighbors."""
    sys.path.insert(0, str(SCRIPTS))
    yield import_module
    sys.path.remove(str(SCRIPTS))
