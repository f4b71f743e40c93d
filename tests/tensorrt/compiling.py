"""The real compiler on networks of random weights, and on networks of a few layers."""

import torch

from phireg.dtypes import torch_dtype
from phireg.reader.tensors import is_scale, rank_tensors
from phireg.tensorrt.compiler import configured
from phireg.tensorrt.engine import Limits
from phireg.tensorrt.graph import Graph
from phireg.tensorrt.job import Job
from phireg.tensorrt.network import build_network
from phireg.tensorrt.package import load_package

LIMITS = Limits(max_batch_size=2, max_input_len=40, max_seq_len=48, max_chunk_len=16)


def rtx():
    return load_package("tensorrt-rtx")


def random_source(spec):
    """Reads tensors that no file has: random, of the kinds that the reader requires."""
    kinds = rank_tensors(spec)

    def read(name):
        code, shape = kinds[name]
        generator = torch.Generator().manual_seed(len(name))
        values = torch.rand(shape, generator=generator) + 0.5
        if is_scale(name):
            values *= 0.01
        elif code == "I8":
            values = (values - 1) * 200
        return values.to(torch_dtype(code))

    return read


def compile_spec(spec, gpus, weights="embedded", rank=0, limits=LIMITS):
    """Build a rank's engine of random weights; its bytes."""
    package = rtx()
    source = random_source(spec) if weights == "embedded" else None
    network = build_network(package, spec, source, rank=rank, capacity=limits.max_seq_len)
    job = Job("tensorrt-rtx", {}, None, "", gpus, weights, limits, 1)
    return serialized(network.graph, configured(package, network, job))


def compile_graph(graph, *gpus, **shapes):
    """Build an engine of any network, for one shape of each dynamic input; its bytes."""
    config = graph.builder.create_builder_config()
    if shapes:
        profile = graph.builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(gpus)
    for number, gpu in enumerate(gpus):
        config.set_compute_capability(getattr(graph.trt.ComputeCapability, gpu.upper()), number)
    return serialized(graph, config)


def serialized(graph, config):
    engine = graph.builder.build_serialized_network(graph.network, config)
    graph.package.log.check("to build the engine", failed=engine is None)
    return bytes(memoryview(engine))


def new_graph():
    return Graph(rtx())
