"""The modules under test."""

import pytest
import torch
from phireg_plugins.phi3_small import reference as reference_module


@pytest.fixture(scope="session")
def reference():
    torch.set_num_threads(1)
    return reference_module
