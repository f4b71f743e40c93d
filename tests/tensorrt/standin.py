"""A stand-in for TensorRT's runtime on a machine without a GPU.

It has the calls of the documented interface that phireg makes, on CPU memory, and is stricter: it
refuses shapes outside the profile, tensors without an address, caches that are not updated in
place, and inputs that were not given. An "engine" is a file that names a checkpoint; what it
computes is the network that phireg builds of it, evaluated by the interpreter.
"""

import ctypes
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from phireg.checkpoint.manifest import file_digest
from phireg.executor.sources import open_ranks
from phireg.files.kinds import BUILD_FILE
from phireg.reader.spec import read_spec
from phireg.tensorrt.build import checkpoint_record
from phireg.tensorrt.compiler import profiles
from phireg.tensorrt.engine import Limits, write_config
from phireg.tensorrt.interpreter import Interpreter
from phireg.tensorrt.job import PROFILES
from phireg.tensorrt.network import build_network

DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32,
    "INT8": torch.int8, "FP8": torch.float8_e4m3fn,
}  # fmt: skip


def write_engine(package, directory, checkpoint, weights="embedded", **limits):
    """Write an engine directory whose engine the stand-in loads."""
    limits = Limits(**{
        "max_batch_size": 3, "max_input_len": 60, "max_seq_len": 80, "max_chunk_len": 16,
    } | limits)  # fmt: skip
    directory.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    write_config(directory, "tensorrt-rtx", package.version, ("sm89",), weights, limits, config)
    content = {"checkpoint": str(checkpoint), "weights": weights, "limits": vars_of(limits)}
    engine = directory / "rank0.engine"
    engine.write_text(json.dumps(content))
    record = {"rank": 0, "bytes": engine.stat().st_size, "digest": file_digest(engine)}
    record |= {"inputs": [], "outputs": [], "layers": {}}
    manifest = {"producer": {"name": "phireg"}}
    manifest |= {"checkpoint": checkpoint_record(checkpoint, 1), "ranks": [record]}
    (directory / BUILD_FILE).write_text(json.dumps(manifest | {"verified": None}))
    return directory


def vars_of(limits):
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}


def standin(package):
    """The package with this runtime in its place; ``loaded`` has the engines it loaded."""
    loaded = []

    class Runtime:
        def __init__(self, logger):
            assert logger is package.logger

        def deserialize_cuda_engine(self, content):
            loaded.append(Engine(package, json.loads(bytes(content))))
            return loaded[-1]

    names = {name: getattr(package.trt, name) for name in dir(package.trt) if name[0] != "_"}
    trt = SimpleNamespace(**names | {"Runtime": Runtime})
    return replace(package, trt=trt), loaded


class Engine:
    def __init__(self, package, content):
        checkpoint = Path(content["checkpoint"])
        spec, limits = read_spec(checkpoint), Limits(**content["limits"])
        (source,) = open_ranks(checkpoint, spec, [0])
        self.network = build_network(
            package,
            spec,
            None if content["weights"] == "separate" else source,
            capacity=limits.max_seq_len,
        )
        self.interpreter = Interpreter(package.trt, self.network.graph.network)
        self.profiles = profiles(self.network, limits)
        self.executions = dict.fromkeys(PROFILES, 0)

        self.tensors = [*self.interpreter.inputs.values()]

    @property
    def num_io_tensors(self):
        return len(self.tensors)

    def get_tensor_name(self, number):
        return self.tensors[number].name

    def get_tensor_shape(self, name):
        return self.interpreter.inputs[name].shape

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.profile = engine, None
        self.shapes, self.addresses = {}, {}
        network = engine.network.graph.network
        self.inputs = engine.interpreter.inputs
        self.outputs = {t.name: t for t in map(network.get_output, range(network.num_outputs))}

    def set_optimization_profile_async(self, number, stream):
        self.profile = PROFILES[number]
        return True

    def set_input_shape(self, name, shape):
        declared = tuple(self.inputs[name].shape)
        least, _, most = self.engine.profiles[self.profile].get(name, (declared,) * 3)
        fits = all(low <= n <= high for low, n, high in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = shape
        return fits

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in self.inputs or name in self.outputs

    def execute_async_v3(self, stream):
        assert self.shapes.keys() == self.inputs.keys()
        assert self.addresses.keys() == self.inputs.keys() | self.outputs.keys()
        given = {name: self.memory(name, self.shapes[name], t) for name, t in self.inputs.items()}
        sizes = {}
        for name, tensor in self.inputs.items():
            for axis, size in enumerate(self.shapes[name]):
                if tensor.shape[axis] == -1:
                    known = sizes.setdefault(tensor.get_dimension_name(axis), size)
                    assert known == size, (name, self.shapes[name])
        results = self.engine.interpreter({name: t.clone() for name, t in given.items()})
        for name, value in results.items():
            if name.startswith("present_"):
                assert self.addresses[name] == self.addresses[name.replace("present", "cache")]
            self.memory(name, tuple(value.shape), self.outputs[name]).copy_(value)
        self.engine.executions[self.profile] += 1
        return True

    def memory(self, name, shape, tensor):
        dtype = DTYPES[tensor.dtype.name]
        size = math.prod(shape) * dtype.itemsize
        buffer = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(shape)
