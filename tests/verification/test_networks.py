"""TensorRT networks against the executor, by the interpreter; no GPU, no compiler."""

import pytest
from planted_networks import PLANTED
from verify_sources import converted, quantized

from phireg.executor import load, read_spec
from phireg.executor.sources import open_ranks
from phireg.tensorrt.network import build_network
from phireg.verification.networks import compare_network

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'phireg[rtx]'")
FAMILIES = ("phi2", "phi3-mini", "phi3-small", "phi3-medium")
CAPACITY = 96
LENGTHS = (5, 40, 60)  # rope switches at 52; the block-sparse window is 8


@pytest.fixture(scope="module")
def package():
    from phireg.tensorrt.package import load_package

    return load_package("tensorrt-rtx")


def errors(package, directory, spec=None, separate=False):
    exact, rounded = (load(directory, dtype=dtype) for dtype in ("float32", None))
    ranks = range(rounded.spec.tp_size)
    sources = open_ranks(directory, rounded.spec, ranks)
    networks = [
        build_network(
            package,
            spec or rounded.spec,
            None if separate else source,
            rank=rank,
            capacity=CAPACITY,
        )
        for rank, source in zip(ranks, sources, strict=True)
    ]
    return compare_network(package.trt, networks, sources, exact, rounded, LENGTHS)


@pytest.mark.parametrize("tp_size", (1, 2))
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_executor_does(package, family, dtype, tp_size):
    results = errors(package, converted(family, tp_size, dtype))
    assert not [result for result in results if result.wrong]


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_with_weights_as_inputs(package, family):
    for directory in (converted(family, dtype="bfloat16"), quantized(family, "fp8")):
        results = errors(package, directory, separate=True)
        assert not [result for result in results if result.wrong]


FORMATS = (
    ("fp8", "fp8"), ("int8_sq", "int8"), ("int8_wo", None), ("int4_wo", None),
)  # fmt: skip


@pytest.mark.parametrize(("qformat", "cache"), FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_quantized_checkpoints(package, family, qformat, cache):
    results = errors(package, quantized(family, qformat, cache))
    assert not [result for result in results if result.wrong]


@pytest.mark.parametrize("name", PLANTED)
def test_finds_the_planted_mistake(package, monkeypatch, name):
    family, (qformat, cache, tp_size), mistake = PLANTED[name]
    directory = converted(family, tp_size)
    if qformat is not None:
        directory = quantized(family, qformat, cache, dtype="float32")
    assert not [result for result in errors(package, directory) if result.wrong]
    spec = mistake(monkeypatch, read_spec(directory))
    assert [result for result in errors(package, directory, spec=spec) if result.wrong]
