"""The process that compiles engines: phireg starts it, so that it can be ended at any moment.

It prints what TensorRT says, and lines of progress, which begin with ``job.MARK`` and continue as
JSON. Each of several ranks has a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import xxhash

from phireg.errors import PhiregError
from phireg.executor.sources import open_ranks
from phireg.reader.spec import parse_spec
from phireg.tensorrt.engine import Limits
from phireg.tensorrt.job import MARK, PROFILES, Job, command, record_path
from phireg.tensorrt.network import INPUT_IDS, LAST_TOKENS, Network, build_network
from phireg.tensorrt.package import Package, load_package


def main() -> None:
    """Compile the job in the file named first, or a rank of it; the outcome goes beside the job."""
    path = Path(sys.argv[1])
    values = json.loads(path.read_text(encoding="utf-8"))
    job = Job(**values | {"gpus": tuple(values["gpus"]), "limits": Limits(**values["limits"])})
    ranks = parse_spec(job.config).tp_size
    if ranks > 1 and len(sys.argv) == 2:
        code = _run_each(path, ranks, job.workers)
        if code < 0:  # end as the rank did, so that a signal is told as one
            os.kill(os.getpid(), -code)
        sys.exit(code)
    rank = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    code = 0
    try:
        record = compile_rank(job, rank)
    except PhiregError as error:
        record, code = {"error": error.message, "hint": error.hint}, error.exit_code
    record_path(path, rank).write_text(json.dumps(record), encoding="utf-8")
    sys.exit(code)


def _run_each(path: Path, ranks: int, workers: int) -> int:
    """Run a process for each rank, ``workers`` at a time; return the first code that is not 0."""
    waiting, running = list(range(ranks)), 0
    while waiting or running:
        while waiting and running < workers:
            arguments = [*command(path), str(waiting.pop(0))]
            os.posix_spawn(arguments[0], arguments, os.environ)
            running += 1
        _, status = os.wait()  # whichever ends first
        running -= 1
        if code := os.waitstatus_to_exitcode(status):
            return code  # the others end with this process's group
    return 0


def compile_rank(job: Job, rank: int) -> dict[str, Any]:
    """Build one rank's engine; return what the manifest says of it."""
    started = time.monotonic()
    package = load_package(job.backend)
    package.log.listen = _say
    spec = parse_spec(job.config)
    source = None
    if job.weights == "embedded" and job.checkpoint is not None:
        (source,) = open_ranks(Path(job.checkpoint), spec, [rank])
    _tell(rank=rank, phase="describing the network")
    network = build_network(package, spec, source, rank=rank, capacity=job.limits.max_seq_len)
    config = configured(package, network, job)
    config.progress_monitor = _monitor(package.trt, rank)
    with Path(job.output, f"rank{rank}.engine").open("wb") as file:
        digest = xxhash.xxh3_128()
        writer = _writer(package.trt, file, digest)
        graph = network.graph
        done = graph.builder.build_serialized_network_to_stream(graph.network, config, writer)
        package.log.check("to build the engine", failed=not done or not file.tell())
        size = file.tell()
    return {
        "rank": rank,
        "bytes": size,
        "digest": digest.hexdigest(),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **described(network),
    }


def configured(package: Package, network: Network, job: Job) -> Any:
    """Return the builder's settings: two profiles, and the GPUs to compile for."""
    graph, trt = network.graph, package.trt
    config = graph.builder.create_builder_config()
    for shapes in profiles(network, job.limits).values():
        profile = graph.builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        package.log.check("a profile", failed=config.add_optimization_profile(profile) < 0)
    if job.gpus:
        config.num_compute_capabilities = len(job.gpus)
        for number, gpu in enumerate(job.gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), number)
    # The names and precisions of layers, for phireg inspect where there is a GPU.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    package.log.check("the builder's settings")
    return config


def profiles(network: Network, limits: Limits) -> dict[str, dict[str, list[list[int]]]]:
    """Return the least, the usual and the largest shape of every dynamic input, by profile."""
    definition = network.graph.network
    steps = {
        "prompt": (1, math.ceil(limits.max_chunk_len / 2), limits.max_chunk_len),
        "generation": (1, 1, 1),
    }
    batches = (1, limits.max_batch_size, limits.max_batch_size)
    shapes: dict[str, dict[str, list[list[int]]]] = {name: {} for name in PROFILES}
    for number in range(definition.num_inputs):
        tensor = definition.get_input(number)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        for name in PROFILES:
            shapes[name][tensor.name] = [
                [batch, step] if tensor.name == INPUT_IDS else [batch, *shape[1:]]
                for batch, step in zip(batches, steps[name], strict=True)
            ]
    # All logits of one row's chunk, or those of the last tokens of all rows.
    rows = shapes["prompt"][LAST_TOKENS]
    rows[-1] = [max(limits.max_batch_size, limits.max_chunk_len)]
    return shapes


def described(network: Network) -> dict[str, Any]:
    """Return inputs, outputs and layers of a network, as the manifest keeps them."""
    definition = network.graph.network

    def tensors(count: int, get: Any) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "dtype": t.dtype.name.lower(), "shape": list(t.shape)}
            for t in map(get, range(count))
        ]

    layers: Counter[str] = Counter()
    for number in range(definition.num_layers):
        layer = definition.get_layer(number)
        layers[f"{layer.type.name} {layer.get_output(0).dtype.name}".lower()] += 1
    return {
        "inputs": tensors(definition.num_inputs, definition.get_input),
        "outputs": tensors(definition.num_outputs, definition.get_output),
        "layers": dict(sorted(layers.items())),
    }


def _tell(**progress: Any) -> None:
    _say(MARK + json.dumps(progress))


def _say(line: str) -> None:
    """Write a line at once: the processes of several ranks have one pipe."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _monitor(trt: Any, rank: int) -> Any:
    """Return a progress monitor that tells of the outer phases and their steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps
                self.step_complete(phase_name, -1)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                done, steps = step + 1, self.steps[phase_name]
                _tell(rank=rank, phase=phase_name, done=done, of=steps)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _writer(trt: Any, file: IO[bytes], digest: xxhash.xxh3_128) -> Any:
    """Return a stream that TensorRT writes an engine to; it holds one copy of it less."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            digest.update(data)
            return file.write(data)

    return Writer()
