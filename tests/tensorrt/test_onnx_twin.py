"""Two judges from outside: onnxruntime, and NVIDIA's parser.

The interpreter's meaning of each layer is checked against onnxruntime on the network that NVIDIA's
parser makes of an ONNX graph; that graph against the executor. Prompts of unequal lengths on both
sides of long rope's switch and past the block-sparse window, then steps through the caches.
"""

import numpy as np
import pytest
import torch
from tiny_checkpoints import MAKERS

from phireg.executor import load, read_spec
from phireg.executor.sources import open_ranks
from phireg.tensorrt.interpreter import Interpreter
from phireg.tensorrt.network import build_network

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'phireg[rtx]'")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx_twin import Twin  # noqa: E402

CAPACITY, STEPS = 48, 3
LENGTHS = (5, 14, 30)


@pytest.fixture(scope="module", params=MAKERS)
def model(request, checkpoints):
    """A checkpoint, its twin and, of every call, the inputs and onnxruntime's outputs."""
    checkpoint = checkpoints(request.param)
    spec = read_spec(checkpoint)
    (source,) = open_ranks(checkpoint, spec, [0])
    serialized = Twin(spec, source, CAPACITY).model.SerializeToString()
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(spec.vocab_size, (n + STEPS,), generator=generator) for n in LENGTHS]
    return checkpoint, spec, source, serialized, rows, calls(session, spec, rows)


def calls(session, spec, rows):
    names = [output.name for output in session.get_outputs()]
    shape = (len(rows), spec.num_kv_heads, CAPACITY, spec.head_size)
    presents = [name for name in names if name != "logits"]
    caches = {n.replace("present", "cache"): np.zeros(shape, np.float32) for n in presents}
    long = [spec.rope.short is not None and n + STEPS > spec.rope.original for n in LENGTHS]
    made = []
    for step in range(STEPS + 1):
        starts = np.array([0 if step == 0 else n + step - 1 for n in LENGTHS])
        counts = LENGTHS if step == 0 else (1,) * len(rows)
        ids = np.zeros((len(rows), max(counts)), np.int64)
        for number, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            ids[number, :count] = row[start : start + count]
        positions = starts[:, None] + np.arange(max(counts)) + CAPACITY * np.array(long)[:, None]
        inputs = {"input_ids": ids, "position_ids": positions, "write_indices": starts} | caches
        outputs = dict(zip(names, session.run(names, inputs), strict=True))
        made.append((starts, counts, inputs, outputs))
        caches = {name.replace("present", "cache"): outputs[name] for name in presents}
    return made


def test_onnxruntime_computes_what_the_executor_does(model):
    directory, _, _, _, rows, made = model
    executor = load(directory)
    for number, row in enumerate(rows):
        expected = executor(row[None])[0]
        for starts, counts, _, outputs in made:
            start, count = int(starts[number]), counts[number]
            actual = torch.from_numpy(outputs["logits"])[number, :count]
            torch.testing.assert_close(actual, expected[start : start + count], **CLOSE)


def test_the_interpreter_computes_nvidias_network_as_onnxruntime(model, package):
    *_, serialized, _, made = model
    trt = package.trt
    builder = trt.Builder(package.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, package.logger)
    assert parser.parse(serialized)
    interpreter = Interpreter(trt, network)
    for _, _, inputs, outputs in made:
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        for name, value in interpreter(given).items():
            torch.testing.assert_close(value, torch.from_numpy(outputs[name]), **CLOSE)


def test_phiregs_network_computes_what_onnxruntime_does(model, package):
    _, spec, source, _, _, made = model
    network = build_network(package, spec, source, capacity=CAPACITY)
    interpreter = Interpreter(package.trt, network.graph.network)
    for starts, counts, inputs, outputs in made:
        given = {n: torch.from_numpy(v) for n, v in inputs.items() if n.startswith("cache")}
        ids = torch.from_numpy(inputs["input_ids"]).int()
        given |= {"input_ids": ids, "past_lengths": torch.from_numpy(starts).int()}
        given["last_tokens"] = torch.arange(ids.numel(), dtype=torch.int32)
        if spec.rope.short is not None:
            offsets = inputs["position_ids"][:, 0] - starts
            given["rope_offsets"] = torch.from_numpy(offsets).int()
        results = interpreter(given)
        logits = results["logits"].view(*ids.shape, -1)
        for number, (start, count) in enumerate(zip(starts, counts, strict=True)):
            expected = torch.from_numpy(outputs["logits"])[number, :count]
            torch.testing.assert_close(logits[number, :count], expected, **CLOSE)
            for name in outputs.keys() - {"logits"}:
                torch.testing.assert_close(
                    results[name][number, :, : start + count],
                    torch.from_numpy(outputs[name])[number, :, : start + count],
                    **CLOSE,
                )


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
