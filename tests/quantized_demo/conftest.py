"""The benchmark's script as a module; each demo model calibrated once."""

import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
script = import_module("quantize_demo")
sys.path.pop(0)


@pytest.fixture(autouse=True, scope="module")
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """Calibrated demo models by family and number of rows."""

    @lru_cache(None)
    def measure(family, rows):
        return script.Measured(family, rows, tmp_path_factory.mktemp(f"{family}-{rows}"))

    return measure


@pytest.fixture(scope="session")
def plain(measured):
    """The unquantized scores."""

    @lru_cache(None)
    def score(family, rows):
        return measured(family, rows).unquantized()

    return score
