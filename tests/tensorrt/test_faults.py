"""What TensorRT for RTX 1.7.1 cannot do: the smallest network of each fault that shaped a network.

A test that fails here is good news: a version without the fault, after which its way round in
phireg.tensorrt, its entry in ``requirements`` and its line in docs/engines.md can go.
"""

import pytest
import torch
from compiling import compile_graph, new_graph, serialized

from phireg.errors import EngineError

HALF = torch.float16


def attention(keys, *, dtype=HALF, decomposable=False, causal="NONE", mask=True):
    """One new token over so many keys."""
    graph = new_graph()
    trt = graph.trt
    query = graph.input("query", dtype, (1, 4, 1, 64))
    cache = [graph.input(name, dtype, (1, 2, keys, 64)) for name in ("keys", "values")]
    settings = {"decomposable": decomposable}
    if mask:
        settings["mask"] = graph.input("mask", torch.bool, (1, 1, 1, keys))
    kinds = trt.AttentionNormalizationOp.SOFTMAX, getattr(trt.CausalMaskKind, causal)
    graph.output("y", graph.add("attention_v2", query, *cache, *kinds, **settings))
    return graph


def cache_update(dtype, index=torch.int32):
    graph = new_graph()
    cache = graph.input("cache", dtype, (1, 2, 32, 16))
    new = graph.input("new", dtype, (1, 2, 4, 16))
    where = graph.input("where", index, (1,))
    mode = graph.trt.KVCacheMode.LINEAR
    graph.output("y", graph.add("kv_cache_update", cache, new, where, mode))
    return graph


def product(dtype):
    graph = new_graph()
    x = graph.input("x", dtype, (4, 16))
    graph.output("y", graph.product(x, graph.constant(torch.ones(8, 16, dtype=dtype))))
    return graph


def odd_int4():
    """Nine values of INT4, in five bytes."""
    graph = new_graph()
    weight = graph.constant(torch.zeros(5, dtype=torch.uint8), None, graph.trt.int4, (3, 3))
    scale = graph.constant(torch.ones(3, dtype=HALF))
    whole = graph.add("dequantize", weight, scale, graph.trt.float16, axis=0)
    graph.output("y", graph.product(graph.input("x", HALF, (4, 3)), whole))
    return graph


def experts():
    """TensorRT's own layer of experts."""
    graph = new_graph()

    def weights(*shape):
        return graph.constant(torch.ones(shape, dtype=HALF))

    layer = graph.layer(
        "moe",
        graph.input("x", HALF, (1, 8, 64)),
        graph.input("chosen", torch.int32, (1, 8, 2)),
        graph.input("shares", HALF, (1, 8, 2)),
    )
    up, gate, down = weights(4, 64, 32), weights(4, 64, 32), weights(4, 32, 64)
    layer.set_gated_weights(up, gate, down, graph.trt.MoEActType.SILU)
    graph.output("y", layer.get_output(0))
    return graph


def test_what_the_next_tests_are_a_step_away_from():
    for graph, gpu in (
        (attention(16384), "sm89"),
        (attention(32768, decomposable=True), "sm89"),
        (cache_update(HALF), "sm89"),
        (product(HALF), "sm75"),
        (product(torch.float32), "sm80"),
    ):
        assert compile_graph(graph, gpu)


@pytest.mark.parametrize(
    ("make", "gpu", "reason"),
    [
        (lambda: product(torch.float32), "sm75", "FP32 GEMM is not supported"),
        (lambda: product(torch.bfloat16), "sm75", "HW-specific datatypes: b16"),
        (lambda: cache_update(torch.float8_e4m3fn), "sm89", "cache has type FP8"),
        (lambda: cache_update(torch.int8), "sm89", "cache has type Int8"),
        (lambda: cache_update(HALF, torch.int64), "sm89", "must be of type int32"),
        (lambda: attention(32768), "sm120", "not supported by a dedicated kernel"),
        (odd_int4, "sm89", "odd tensor volume"),
        (experts, "sm89", "Cannot decompose operation"),
        (experts, "sm120", "Cannot decompose operation"),
    ],
)
def test_what_does_not_compile(make, gpu, reason):
    with pytest.raises(EngineError, match=reason):
        compile_graph(make(), gpu)


def test_a_mask_beside_a_causal_kind_is_dropped_without_an_error_but_in_the_log():
    with pytest.raises(EngineError, match="Option mask cannot be used together"):
        attention(64, causal="LOWER_RIGHT")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
@pytest.mark.parametrize("flag", ["REFIT", "STRIP_PLAN"])
def test_engines_without_their_weights_do_not_build_without_a_driver(flag):
    graph = product(HALF)
    config = graph.builder.create_builder_config()
    config.set_flag(getattr(graph.trt.BuilderFlag, flag))
    with pytest.raises(EngineError, match="CUDA_SUCCESS"):
        serialized(graph, config)
