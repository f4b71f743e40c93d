"""What the compilers refuse, told before work; and what a build will take.

Facts are from builds with TensorRT for RTX 1.7.1 (tests/tensorrt/test_matrix.py makes them again,
test_faults.py keeps the smallest network of each fault); docs/engines.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from phireg.dtypes import ITEMSIZE
from phireg.reader.schemes import LINEARS, SCHEMES
from phireg.reader.spec import ModelSpec
from phireg.reader.tensors import layer_tensors, rank_tensors

WeightsForm: TypeAlias = Literal["embedded", "separate"]
"""Weights inside the engine, or inputs that are fed from the rank files when it runs."""

DEFAULT_TOKENS = 4096
"""Of prompt and continuation, where nothing is asked for and the model has more."""

_FUSED_SLOTS = 32768
# Measured by benchmarks/engine.py. While it compiles, the builder holds copies of weights beside
# the engine: of the layers' bytes this part, where they are quantized and where they are not.
_COPIES = {True: 0.3, False: 0.75}
_LEAST_MEMORY, _LEAST_SECONDS = 450e6, 2.0
_SECONDS_PER_LAYER, _SECONDS_PER_BYTE = 0.25, 4e-9
_ENGINE_PER_LAYER = 0.5e6


@dataclass(frozen=True, slots=True)
class Estimate:
    """What building the engine of one rank takes, and what running it does."""

    engine_bytes: int
    memory_bytes: int  # besides the pages of mapped files
    cpu_seconds: float
    cache_bytes: int  # of the largest batch, when it runs


def required_capabilities(spec: ModelSpec) -> dict[str, int]:
    """Return the least compute capability (89 is 8.9) by the name of what needs it."""
    quantization = spec.quantization
    needs = {}
    if spec.dtype == "bfloat16":
        needs["bfloat16"] = 80
    if spec.dtype == "float32" or spec.experts is not None:
        needs["a matrix product in float32"] = 80
    if quantization.weights == "int4_wo":
        needs["INT4 weights"] = 80
    if "fp8" in (quantization.weights, quantization.kv_cache):
        needs["FP8"] = 89
    return needs


def capability_problems(spec: ModelSpec, gpus: Sequence[str]) -> Iterator[str]:
    """Yield why a model cannot be compiled for some of the GPUs ("sm75")."""
    for gpu in gpus:
        for what, least in required_capabilities(spec).items():
            if int(gpu.removeprefix("sm")) < least:
                yield f"{what} needs compute capability {shown(least)} or more; {gpu} has less"


def size_problems(spec: ModelSpec) -> Iterator[str]:
    """Yield which weights have a size or a form that no compiler takes."""
    if spec.experts is not None and spec.quantization.weights is not None:
        yield "its experts are quantized, which TensorRT-LLM alone builds"
    weights = spec.quantization.weights
    if weights is not None and SCHEMES[weights].grouped:
        yield (
            f"its weights are quantized in groups ({SCHEMES[weights].quant_algo}), which "
            "TensorRT-LLM alone builds"
        )
    if weights == "int4_wo":
        for name, (_, shape) in layer_tensors(spec, 0).items():
            if name.endswith(".weight") and len(shape) == 2 and math.prod(shape) % 2:
                yield f"{name} of every layer is {list(shape)}: INT4 needs an even number of values"


def form_problems(spec: ModelSpec, form: WeightsForm) -> Iterator[str]:
    """Yield why a model's weights cannot be inputs."""
    if form == "separate" and spec.quantization.weights in ("int8_wo", "int4_wo"):
        yield (
            "weights of a weight-only format are quantized while the engine is built, so that "
            "they are inside it"
        )


def remarks(spec: ModelSpec, capacity: int) -> Iterator[str]:
    """Yield what a user would not expect of the engine."""
    if (grid := spec.quantization.kv_cache) is not None:
        yield (
            f"the {grid.upper()} KV cache is exact in its numbers, but takes 16 bits a value: no "
            "compiler stores one in 8"
        )
    if spec.experts is not None:
        yield (
            f"all {spec.experts.count} experts compute every token: no compiler takes TensorRT's "
            "layer of experts for these GPUs"
        )
    if capacity >= _FUSED_SLOTS:
        yield (
            f"with {capacity} tokens there is no fused attention for generation, as there is below "
            f"{_FUSED_SLOTS} (--max-seq-len)"
        )


def estimate(spec: ModelSpec, form: WeightsForm, batch: int, capacity: int) -> Estimate:
    """Estimate a rank's build from measured ones."""
    ends = layers = quantized = 0  # bytes; the last, of what is quantized for the build
    for name, (code, shape) in rank_tensors(spec).items():
        count, (module, _, part) = math.prod(shape), name.rpartition(".")
        scheme = spec.quantization.scheme(module)
        if not name.startswith("transformer.layers."):
            ends += count * ITEMSIZE[code]
        elif scheme and scheme.weight is None and part == "weight" and module.endswith(LINEARS):
            quantized += count // (2 if scheme.qformat == "int4_wo" else 1)
        else:
            layers += count * ITEMSIZE[code]
    if form == "separate":
        ends = layers = quantized = 0
    engine = ends + layers + quantized + _ENGINE_PER_LAYER * spec.num_layers
    copies = _COPIES[spec.quantization.weights is not None] * (layers + quantized) + quantized
    slots = 2 * spec.num_layers * spec.rank_kv_heads * capacity * spec.head_size * batch
    return Estimate(
        engine_bytes=int(engine),
        memory_bytes=int(engine + copies + _LEAST_MEMORY),
        cpu_seconds=_LEAST_SECONDS
        + _SECONDS_PER_LAYER * spec.num_layers
        + _SECONDS_PER_BYTE * (ends + layers + quantized),
        cache_bytes=slots * (4 if spec.dtype == "float32" else 2),
    )


def shown(capability: int) -> str:
    """Write 89 as 8.9."""
    return f"{capability // 10}.{capability % 10}"
