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
from phireg.reader.spec import ModelSpec
from phireg.reader.tensors import rank_tensors

WeightsForm: TypeAlias = Literal["embedded", "separate"]
"""Weights inside the engine, or inputs that are fed from the rank files when it runs."""

DEFAULT_TOKENS = 4096
"""Of prompt and continuation, where nothing is asked for and the model has more."""

_FUSED_SLOTS = 32768
# Measured by benchmarks/engine.py: what a build takes besides the engine itself.
_PEAK, _PEAK_PER_LAYER = 450e6, 50e6
_SECONDS_PER_LAYER, _SECONDS_PER_BYTE = 1.25, 6.6e-9
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


def least_capability(spec: ModelSpec) -> int:
    """Return the least compute capability that all of a model needs; 0 is any."""
    return max(required_capabilities(spec).values(), default=0)


def capability_problems(spec: ModelSpec, gpus: Sequence[str]) -> Iterator[str]:
    """Yield why a model cannot be compiled for some of the GPUs ("sm75")."""
    for gpu in gpus:
        for what, least in required_capabilities(spec).items():
            if int(gpu.removeprefix("sm")) < least:
                yield f"{what} needs compute capability {shown(least)} or more; {gpu} has less"


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
    stored = quantized = 0
    for name, (code, shape) in rank_tensors(spec).items():
        count, size = math.prod(shape), ITEMSIZE[code]
        scheme = spec.quantization.scheme(name.removesuffix(".weight"))
        if scheme is not None and scheme.weight is None and name.endswith(".weight"):
            in_layer = name.startswith("transformer.layers.") and "norm" not in name
            if in_layer:
                quantized += count if scheme.qformat == "int8_wo" else count // 2
                continue
        stored += count * size
    layers = spec.num_layers
    weights = stored + quantized if form == "embedded" else 0
    slots = 2 * layers * spec.rank_kv_heads * capacity * spec.head_size * batch
    return Estimate(
        engine_bytes=int(weights + _ENGINE_PER_LAYER * layers),
        memory_bytes=int(weights + quantized + _PEAK + _PEAK_PER_LAYER * layers),
        cpu_seconds=_SECONDS_PER_LAYER * layers + _SECONDS_PER_BYTE * weights,
        cache_bytes=slots * (4 if spec.dtype == "float32" else 2),
    )


def shown(capability: int) -> str:
    """Write 89 as 8.9."""
    return f"{capability // 10}.{capability % 10}"
