"""One folder for the sources and checkpoints that the tests share, and a damaged checkpoint."""

import pytest
import verify_sources
from planted import PLANTED


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory):
    verify_sources.ROOT.append(tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="session")
def damaged(tmp_path_factory):
    """Rows of layer 1's qkv are wrong; the name holds markup."""
    directory = tmp_path_factory.mktemp("damaged") / "<b>&checkpoint"
    verify_sources.copied("phi3-small", 2, directory)
    PLANTED["interleave forgotten at TP 2"].damage(directory, "phi3-small")
    return directory
