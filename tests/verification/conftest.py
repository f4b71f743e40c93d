"""One folder for the sources and checkpoints that the tests share."""

import pytest
import verify_sources


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory):
    verify_sources.ROOT.append(tmp_path_factory.mktemp("verify"))
