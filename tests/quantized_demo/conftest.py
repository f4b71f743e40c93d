"""Each demo model calibrated once."""

from functools import lru_cache

import pytest
from demo_script import script


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
