"""The one TensorRT of the tests."""

import pytest
import torch
from standin import standin, write_engine
from tiny_checkpoints import convert

from phireg.tensorrt import runtime, session
from phireg.verification import engine as verification_engine


@pytest.fixture(scope="session")
def package():
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'phireg[rtx]'")
    from phireg.tensorrt.package import load_package

    return load_package("tensorrt-rtx")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Checkpoints by family, converted once; not to be changed."""
    made = {}

    def checkpoint(family):
        if family not in made:
            made[family] = convert(family, tmp_path_factory.mktemp(family))
        return made[family]

    return checkpoint


@pytest.fixture
def engines(package, checkpoints, tmp_path, monkeypatch):
    """Make engines for the stand-in, which takes the place of TensorRT and its GPU."""
    module, loaded = standin(package)
    monkeypatch.setattr(session, "load_package", lambda backend: module)
    for user in (runtime, verification_engine):
        monkeypatch.setattr(user, "engine_device", lambda name: torch.device("cpu"))

    def engine(family, **options):
        return write_engine(package, tmp_path / f"{family}-engine", checkpoints(family), **options)

    engine.loaded = loaded
    return engine
