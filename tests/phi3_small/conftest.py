"""The modules under test."""

import pytest
from phireg_plugins.phi3_small import reference as reference_module


@pytest.fixture(scope="session")
def reference():
    return reference_module
