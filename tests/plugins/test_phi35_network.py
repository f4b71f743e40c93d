"""The experts of Phi-3.5-MoE in a TensorRT network, by the interpreter."""

import pytest
from phireg_plugins.phi35_moe import FAMILY as PHI35_MOE
from test_phi35_verified import SIZES
from unregistered import convert

from phireg.executor import load
from phireg.executor.sources import open_ranks
from phireg.tensorrt import mlp
from phireg.tensorrt.network import build_network
from phireg.testing import write_tiny_model
from phireg.verification.networks import compare_network

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'phireg[rtx]'")


def wrong(checkpoint):
    from phireg.tensorrt.package import load_package

    package = load_package("tensorrt-rtx")
    exact, rounded = load(checkpoint, dtype="float32"), load(checkpoint)
    ranks = range(rounded.spec.tp_size)
    sources = open_ranks(checkpoint, rounded.spec, ranks)
    networks = [
        build_network(package, rounded.spec, source, rank=rank, capacity=48)
        for rank, source in zip(ranks, sources, strict=True)
    ]
    results = compare_network(package.trt, networks, sources, exact, rounded, [5, 30])
    return [result.place for result in results if result.wrong]


@pytest.mark.parametrize("options", [{}, {"tp_size": 2}, {"tp_size": 2, "moe_ep_size": 2}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts(options, dtype, tmp_path, monkeypatch):
    write_tiny_model(PHI35_MOE, SIZES, tmp_path / "source")
    options |= {"dtype": dtype}
    checkpoint = convert(PHI35_MOE, tmp_path / "source", tmp_path / "ckpt", **options)
    assert wrong(checkpoint) == []
    original = mlp._silu
    monkeypatch.setattr(mlp, "_silu", lambda graph, gate: original(graph, graph.unary("ABS", gate)))
    assert (0, "mlp") in wrong(checkpoint)
