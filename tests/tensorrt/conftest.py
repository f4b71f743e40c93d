"""The one TensorRT of the tests."""

import pytest


@pytest.fixture(scope="session")
def package():
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'phireg[rtx]'")
    from phireg.tensorrt.package import load_package

    return load_package("tensorrt-rtx")
